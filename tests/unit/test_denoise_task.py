"""A rank's task, alone in this process: what it keeps, and where its weights are."""

import json

import pytest
import torch

from distributed.denoise.job import Conditions, DenoiseJob
from distributed.denoise.loading import OnHost
from distributed.denoise.placement import sizes_of
from distributed.denoise.task import KEPT, DenoiseTask
from distributed.denoise.weights import open_transformer
from distributed.errors import Cancelled, NotLoaded
from distributed.ranks.task import JobWatch
from tests.unit.denoise_models import make_inputs, make_model, run


@pytest.fixture(scope="module")
def model():
    return make_model(use_meanflow=True)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    model.save_pretrained(path)
    return open_transformer(path)


@pytest.fixture
def task():
    return DenoiseTask(torch.device("cpu"))


def make_job(model, checkpoint, **options):
    """A step, and what diffusers' forward makes of it."""
    inputs = make_inputs(model, **options)
    expected = model(**inputs, return_dict=False)[0]
    latents, times = inputs.pop("hidden_states"), [inputs.pop(name, None) for name in ("timestep", "timestep_r")]
    conditions = Conditions.make(checkpoint, **inputs)
    return DenoiseJob.make(checkpoint, latents, times[0], [conditions], times[1]), expected


def on_host(task):
    return [name for name, layer in task.transformer.model.named_modules() if isinstance(layer, OnHost)]


def test_a_limit_leaves_the_modulation_on_the_host_and_the_result_as_it_is(model, checkpoint, task):
    job, expected = make_job(model, checkpoint)
    torch.testing.assert_close(run(task, job), expected, atol=1e-5, rtol=1e-5)
    assert on_host(task) == []
    sizes = task._sizes(job.request)
    all_of_it = sizes.needed(sizes.fastest)
    torch.testing.assert_close(run(task, job.limited(all_of_it - 1)), expected, atol=1e-5, rtol=1e-5)
    assert len(on_host(task)) == 2 * model.config.num_layers + 1
    least = all_of_it - sizes.modulation
    torch.testing.assert_close(run(task, job.limited(least)), expected, atol=1e-5, rtol=1e-5)
    assert task.placement.streamed == ()


def test_the_weights_are_counted_by_what_they_serve(model, checkpoint):
    layers = [part for block in model.transformer_blocks for part in (block.norm1.linear, block.norm1_context.linear)]
    weights = [weight for layer in (*layers, model.norm_out.linear) for weight in layer.parameters()]
    sizes = sizes_of(checkpoint.architecture, torch.float32, None)
    assert sizes.modulation == sum(weight.nbytes for weight in weights)
    assert sizes.weights(sizes.fastest) == sum(weight.nbytes for weight in model.parameters())


def test_the_modulation_of_a_timestep_is_computed_once(model, checkpoint, task, monkeypatch):
    job, expected = make_job(model, checkpoint, text=(5, 3), glyphs=(3, 0))
    torch.testing.assert_close(run(task, job), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(task.transformer, "modulation", None)
    torch.testing.assert_close(run(task, job), expected, atol=1e-5, rtol=1e-5)
    assert len(task.modulations) == 1


def test_conditions_that_were_not_sent_or_are_long_ago_are_asked_for(model, checkpoint, task):
    jobs = [make_job(model, checkpoint, seed=seed)[0] for seed in range(KEPT + 1)]
    fields = [job.fields | {"dtype": "float32"} for job in jobs]
    with pytest.raises(NotLoaded):
        task.load(fields[0], {}, JobWatch())
    for job in jobs:
        for load in job.loads:
            task.load(load.fields | {"dtype": "float32"}, load.inputs, JobWatch())
    with pytest.raises(NotLoaded):
        task.load(fields[0], {}, JobWatch())
    task.load(fields[1], {}, JobWatch())


def test_the_oldest_conditions_and_new_ones_can_be_those_of_one_step(model, checkpoint, task):
    inputs = [make_inputs(model, seed=seed) for seed in range(KEPT + 1)]
    steps = [[one.pop(name) for name in ("hidden_states", "timestep", "timestep_r")] for one in inputs]
    latents, timestep, timestep_r = steps[0]
    conditions = [Conditions.make(checkpoint, **one) for one in inputs]
    for first, second in ((0, 1), (2, 3), (0, 4)):
        pair = [conditions[first], conditions[second]]
        run(task, DenoiseJob.make(checkpoint, latents, timestep, pair, timestep_r))
    assert list(task.conditions) == [conditions[i].key for i in (2, 3, 0, 4)]


def test_weights_are_loaded_again_when_only_their_config_has_changed(task, tmp_path):
    make_model().save_pretrained(tmp_path)
    before, _ = make_job(make_model(), open_transformer(tmp_path))
    run(task, before)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 16.0}))
    job, expected = make_job(make_model(rope_theta=16.0), open_transformer(tmp_path))
    torch.testing.assert_close(run(task, job), expected, atol=1e-5, rtol=1e-5)


def test_a_release_keeps_conditions_and_nothing_else(model, checkpoint, task):
    job, _ = make_job(model, checkpoint)
    run(task, job)
    task.release()
    assert task.transformer is None and not task.contexts and not task.modulations and task.conditions
    fields = job.fields | {"dtype": "float32"}
    task.load(fields, {}, JobWatch())
    assert task.fits(fields, 0) is False and task.fits(fields, 2**40)
    assert task.fits(job.limited(2**20).fields | {"dtype": "float32"}, 2**20)


def test_a_cancel_ends_loading_and_a_step_between_its_blocks(model, checkpoint, task):
    job, expected = make_job(model, checkpoint)
    watch = JobWatch()
    watch.begin(1)
    watch.cancel(1)
    with pytest.raises(Cancelled):
        run(task, job, watch)
    assert task.loaded is None
    run(task, job)
    with pytest.raises(Cancelled):
        run(task, job, watch)
    assert watch.state == (1, 1, model.config.num_layers)
    torch.testing.assert_close(run(task, job), expected, atol=1e-5, rtol=1e-5)
