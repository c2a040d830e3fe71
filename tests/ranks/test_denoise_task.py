"""Denoising steps on real ranks: the velocities of diffusers' forward, whatever happens to the ranks."""

import pytest
import torch
from torch import Tensor

from distributed import Cancelled, JobError, RankGroup
from tests.ranks.moments import kill_within_a_job, pids
from tests.unit.denoise_models import make_inputs, make_model

SMALL = {"latent": (3, 4, 5)}
LONG = {"latent": (4, 22, 22), "image": False}
FIXED = 5
"""Condition channels of the nine."""


@pytest.fixture(scope="module")
def model():
    return make_model(num_layers=8)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model in several files, as the real one comes."""
    path = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(path / "transformer", max_shard_size="1MB")
    return path


def step(model, *, branches: int = 2, **options) -> tuple[Tensor, float, list[dict[str, Tensor]], Tensor]:
    """The arguments of a step, and the velocities that diffusers' forward gives."""
    texts = [{}, {"text": (2,), "glyphs": (0,), "seed": 2}][:branches]
    sides = [make_inputs(model, **options, **text) for text in texts]
    latents, time = sides[0]["hidden_states"], sides[0]["timestep"]
    for side in sides:
        side |= {"hidden_states": latents}
    expected = torch.stack([model(**side, return_dict=False)[0] for side in sides])
    rest = [{name: part for name, part in side.items() if name not in ("hidden_states", "timestep")} for side in sides]
    conditions = [side | {"latents": latents[:, -FIXED:]} for side in rest]
    return latents[:, :-FIXED], float(time[0]), conditions, expected


def sample(denoiser, noise: Tensor, conditions: list, steps: int, **options) -> Tensor:
    """A sampling in miniature, with guidance."""
    for i in range(steps):
        cond, uncond = denoiser(noise, 1000 * (1 - i / steps), conditions, **options)
        noise = noise - (uncond + 3 * (cond - uncond)) / steps
    return noise


def counted(group, monkeypatch) -> list[str]:
    """The kinds of messages that a group sends its ranks."""
    sent, send = [], group._send

    def count(message, *args):
        sent.append(type(message).__name__)
        send(message, *args)

    monkeypatch.setattr(group, "_send", count)
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_give_the_velocities_of_diffusers_forward(ranks, model, folder):
    with RankGroup(["cpu"] * ranks) as group:
        denoiser = group.denoiser(folder)
        for branches in (1, 2):
            for options in (SMALL, {"latent": (1, 2, 3), "image": False}):
                latents, time, conditions, expected = step(model, branches=branches, **options)
                velocity = denoiser(latents, time, conditions)
                assert velocity.dtype == torch.float32 and velocity.shape == expected.shape
                torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(velocity[0], velocity[1], atol=1e-2)


@pytest.fixture(scope="module")
def pair(folder):
    with RankGroup(["cpu", "cpu"]) as group:
        yield group


@pytest.fixture(scope="module")
def denoiser(pair, folder):
    return pair.denoiser(folder)


def test_videos_of_a_batch_have_texts_of_their_own(model, denoiser):
    inputs = make_inputs(model, text=(5, 9), glyphs=(0, 3), image=True)
    expected = model(**inputs, return_dict=False)[0]
    latents = inputs.pop("hidden_states")
    (velocity,) = denoiser(latents, inputs.pop("timestep"), [inputs])
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_conditions_travel_once(model, pair, denoiser, monkeypatch):
    sent = counted(pair, monkeypatch)
    latents, time, conditions, expected = step(model, **SMALL)
    prepared = [denoiser.conditions(**side) for side in conditions]
    other = [
        denoiser.conditions(**side | {"encoder_hidden_states": 2 * side["encoder_hidden_states"]})
        for side in conditions
    ]
    for _ in range(3):
        torch.testing.assert_close(denoiser(latents, time, prepared), expected, atol=1e-5, rtol=1e-5)
    changed = denoiser(latents, time, other)
    assert not torch.allclose(changed, expected, atol=1e-2)
    denoiser(latents, time, conditions)  # the same contents
    pair.release()
    torch.testing.assert_close(denoiser(latents, time, prepared), expected, atol=1e-5, rtol=1e-5)
    assert sent.count("Load") <= 4 and sent[-1] == "Run"


def test_a_killed_rank_costs_the_step_in_hand_and_no_more(model, pair, denoiser, monkeypatch):
    noise, _, conditions, _ = step(model, **LONG)
    conditions = [denoiser.conditions(**side) for side in conditions]
    expected = sample(denoiser, noise, conditions, 3)
    before, notices, sent = pids(pair), [], counted(pair, monkeypatch)

    def notice(words: str) -> None:
        notices.append(words)

    killer = kill_within_a_job(pair, 1)
    result = sample(denoiser, noise, conditions, 3, notice=notice)
    killer.join()
    assert pids(pair) != before and len(notices) == 1 and "retrying the denoising step" in notices[0]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert sent == ["Run"] * (sent.index("Load") - 1) + ["Run", "Load", "Load"] + ["Run"] * (5 - sent.index("Load"))


def test_a_cancel_is_heard_within_a_step_and_ranks_stay_warm(model, pair, denoiser):
    noise, time, conditions, expected = step(model, **LONG)
    before, seen = pids(pair), []

    def cancel(done: int, total: int) -> None:
        if 0 < done < total:
            pair.cancel()

    (condition, _) = (dict(side) for side in conditions)
    condition.pop("latents")
    with pytest.raises(Cancelled):  # of a step that would take ten seconds or more
        denoiser(torch.randn(1, 9, 8, 40, 40), time, [condition], progress=cancel)
    velocities = denoiser(noise, time, conditions, progress=lambda *progress: seen.append(progress))
    torch.testing.assert_close(velocities, expected, atol=1e-5, rtol=1e-5)
    assert seen[-1] == (16, 16)
    assert pids(pair) == before


def test_decoding_and_denoising_share_the_ranks(model, pair, denoiser, vae):
    latents, time, conditions, expected = step(model, **SMALL)
    latent = torch.randn(1, 32, 2, 3, 4)
    for _ in range(2):
        torch.testing.assert_close(denoiser(latents, time, conditions), expected, atol=1e-5, rtol=1e-5)
        assert pair.decode(latent, vae).isfinite().all()


def test_a_memory_limit_that_does_not_suffice_is_refused_with_numbers(model, pair, denoiser):
    latents, time, conditions, _ = step(model, **SMALL)
    before = pids(pair)
    with pytest.raises(JobError, match=r"the denoising step needs 0\.1\d GiB, 0\.06 GiB is available"):
        denoiser(latents, time, conditions, memory=2**26)
    assert pids(pair) == before


def test_bad_input_is_refused_before_ranks_start(model, folder):
    group = RankGroup(["cpu", "cpu"])
    denoiser = group.denoiser(folder)
    latents, time, conditions, _ = step(model, **SMALL)
    text = conditions[0]["encoder_hidden_states"]
    for arguments, words in (
        ((latents[0], time, conditions), "The latents have shape"),
        ((latents.int(), time, conditions), "The latents hold torch.int32"),
        ((latents[:, :3], time, conditions), "The latents have 3 channels and their condition has 5"),
        ((latents[..., :2], time, conditions), "The condition's latents have sizes"),
        ((latents, float("nan"), conditions), "timestep is"),
        ((latents, time, []), "A step has 0 conditions"),
        ((latents, time, [*conditions, conditions[0]]), "A step has 3 conditions"),
        ((latents, time, [conditions[0] | {"encoder_hidden_states": text[..., 1:]}]), "The text has shape"),
        ((latents, time, [conditions[0] | {"encoder_attention_mask": text[0]}]), "The text's mask has shape"),
        ((latents, time, [conditions[0] | {"encoder_attention_mask": 0 * text[..., 0]}]), "no valid token"),
    ):
        with pytest.raises(JobError, match=words):
            denoiser(*arguments)
    with pytest.raises(JobError, match="Meanflow"):
        denoiser(latents, time, conditions, timestep_r=3.0)
    with pytest.raises(JobError, match="There is no file"):
        group.denoiser(folder / "nothing")
    assert group.status()["state"] == "stopped"
