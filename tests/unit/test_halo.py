"""The order of gathered keys and values, without communication."""

import pytest
import torch

from distributed.vae.halo import Halo
from distributed.vae.regions import divide


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 7])
def test_keys_and_values_are_in_the_pictures_order_for_any_division(ranks, monkeypatch):
    division = divide(5, 7, ranks)
    picture = torch.arange(2 * 5 * 7 * 3.0).view(2, 5, 7, 3)
    parts = [picture[:, r.top : r.bottom, r.left : r.right].flatten(1, 2) for r in division.regions]
    halo = Halo(division, 0, None)
    monkeypatch.setattr(halo, "_all", lambda own: [torch.cat([part, -part]) for part in parts])
    keys, values = halo.gather(parts[0], -parts[0])
    assert torch.equal(keys, picture.flatten(1, 2)) and torch.equal(values, -keys)
