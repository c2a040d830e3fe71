"""Sampling: the latents are those of diffusers' pipeline; progress, interrupts, and checks of sizes."""

import threading
from typing import ClassVar

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)
from PIL import Image

POSITIVE, NEGATIVE = 'a red fox, "hello"', "blurry"
SIZE = {"width": 64, "height": 48, "frames": 5, "steps": 3, "guidance": 4.0, "shift": 7.0, "seed": 11}


@pytest.fixture(scope="module")
def loaded(pack, tiny_folders):
    """Both tiny pipelines, loaded as the nodes load them."""
    return {kind: pack.loading.load_pipeline(folder, torch.float32, "model") for kind, folder in tiny_folders.items()}


@pytest.fixture(scope="module")
def texts(pack, loaded):
    return {kind: pack.text.encode(pipeline, POSITIVE, NEGATIVE) for kind, pipeline in loaded.items()}


@pytest.fixture(params=["resident", "streamed"])
def weights(request, loaded, monkeypatch) -> str:
    """Where a sampling has the transformer's weights. Streamed: as with offload "group" on an accelerator."""
    if request.param == "streamed":
        monkeypatch.delitem(loaded["t2v"].patchers, "transformer")
    return request.param


def reference(pipeline, **arguments) -> torch.Tensor:
    """Return the latents of diffusers' own pipeline, in VAE space."""
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=SIZE["guidance"])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=SIZE["shift"])
    latents = pipeline(
        prompt=POSITIVE,
        negative_prompt=NEGATIVE,
        num_frames=SIZE["frames"],
        num_inference_steps=SIZE["steps"],
        generator=torch.Generator("cpu").manual_seed(SIZE["seed"]),
        output_type="latent",
        **arguments,
    ).frames
    return latents / pipeline.vae.config.scaling_factor


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("weights")
def test_text_to_video_gives_the_pipelines_latents(pack, loaded, texts, tiny_folders):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tiny_folders["t2v"], local_files_only=True)
    expected = reference(pipeline, width=SIZE["width"], height=SIZE["height"])
    result = pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE)
    assert result.shape == (1, 32, 2, 3, 4) and result.dtype == torch.float32 and result.device.type == "cpu"
    assert error(result, expected) < 1e-5
    other = pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE | {"seed": 12})
    assert error(other, expected) > 0.1


def test_a_guider_that_changes_layers_gets_diffusers_forward_and_is_refused_on_ranks(pack, tiny_folders, texts):
    class Changing(ClassifierFreeGuidance):
        seen: ClassVar[list] = []

        def prepare_models(self, denoiser: torch.nn.Module) -> None:
            self.seen.append(denoiser)

    loaded = pack.loading.load_pipeline(tiny_folders["t2v"], torch.float32, "model")
    loaded.pipeline.guider = Changing()
    pack.sampling.sample(loaded, texts["t2v"], **SIZE | {"steps": 1})
    assert Changing.seen and all(seen is loaded.pipeline.transformer for seen in Changing.seen)
    with pytest.raises(ValueError, match="guider is Changing"):
        pack.sampling.sample(loaded, texts["t2v"], **SIZE, rank_group=object())


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_streamed_transformer_gives_the_latents_of_a_resident_one(pack, loaded, texts, monkeypatch, kind):
    pipeline, transformer = loaded[kind], loaded[kind].pipeline.transformer
    options = SIZE | ({"start_image": torch.rand(1, 48, 64, 3)} if kind == "i2v" else {})
    expected = pack.sampling.sample(pipeline, texts[kind], **options)
    threads, places = set(threading.enumerate()), [part.data_ptr() for part in transformer.parameters()]
    streaming: set[threading.Thread] = set()
    monkeypatch.delitem(pipeline.patchers, "transformer")
    monkeypatch.setattr(type(transformer), "forward", None)  # diffusers' own

    def on_step(_: torch.Tensor) -> None:
        streaming.update(thread for thread in threading.enumerate() if thread.name.startswith("weights"))

    assert torch.equal(pack.sampling.sample(pipeline, texts[kind], **options, on_step=on_step), expected)
    assert [part.data_ptr() for part in transformer.parameters()] == places
    (own,) = streaming - threads
    own.join(60)
    assert not own.is_alive()  # nor is what the device held


def test_image_to_video_gives_the_pipelines_latents(pack, loaded, texts, tiny_folders):
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(tiny_folders["i2v"], local_files_only=True)
    pixels = torch.randint(0, 256, (90, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = reference(pipeline, image=Image.fromarray(pixels.numpy()))
    height, width = (16 * side for side in expected.shape[-2:])
    image = (pixels.float() / 255)[None]
    size = SIZE | {"width": width, "height": height}
    assert error(pack.sampling.sample(loaded["i2v"], texts["i2v"], **size, start_image=image), expected) < 1e-5
    other = pack.sampling.sample(loaded["i2v"], texts["i2v"], **size, start_image=1 - image)
    assert error(other, expected) > 1e-3


def test_image_to_video_takes_the_size_that_it_is_given(pack, loaded, texts):
    image = torch.rand(2, 30, 50, 4)  # more than one picture, transparency, another shape
    assert pack.sampling.sample(loaded["i2v"], texts["i2v"], **SIZE, start_image=image).shape == (1, 32, 2, 3, 4)


def test_a_run_changes_nothing_in_the_pipeline_that_others_share(pack, loaded, texts):
    pipeline = loaded["t2v"].pipeline
    before = (pipeline.scheduler, dict(pipeline.scheduler.config), pipeline.guider, dict(pipeline.guider.config))
    first = pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE)
    pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE | {"shift": 1.0, "guidance": 1.0})
    assert torch.equal(pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE), first)
    after = (pipeline.scheduler, dict(pipeline.scheduler.config), pipeline.guider, dict(pipeline.guider.config))
    assert before == after


@pytest.mark.parametrize(("name", "value"), [("guidance", 1.0), ("shift", 2.0), ("steps", 2)])
def test_each_setting_makes_a_difference(pack, loaded, texts, name, value):
    first = pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE)
    assert not torch.equal(pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE | {name: value}), first)


def test_each_step_reports_the_expected_end_and_the_last_one_the_end_itself(pack, loaded, texts):
    seen = []
    result = pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE, on_step=seen.append)
    assert len(seen) == SIZE["steps"] and not torch.allclose(seen[0], seen[-1])
    expected = seen[-1].float() / loaded["t2v"].pipeline.vae.config.scaling_factor
    torch.testing.assert_close(expected, result, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("weights")
def test_each_block_of_each_forward_is_reported(pack, loaded, texts):
    seen = []
    pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE, on_block=lambda *progress: seen.append(progress))
    blocks = len(loaded["t2v"].pipeline.transformer.transformer_blocks)
    assert seen == [(done, blocks) for done in range(1, blocks + 1)] * 2 * SIZE["steps"]


@pytest.mark.usefixtures("weights")
def test_an_interrupt_ends_the_sampling_within_a_step(pack, loaded, texts):
    import comfy.model_management as management

    calls = []

    def interrupt(*_):
        calls.append(1)
        management.interrupt_current_processing(True)

    hook = loaded["t2v"].pipeline.transformer.register_forward_hook(interrupt)
    try:
        with pytest.raises(management.InterruptProcessingException):
            pack.sampling.Sampler.execute(pipeline=loaded["t2v"], conditioning=texts["t2v"], **SIZE | {"steps": 20})
    finally:
        hook.remove()
    assert len(calls) == 1  # the step's second forward, with the negative prompt, ended between its blocks
    output = pack.sampling.Sampler.execute(pipeline=loaded["t2v"], conditioning=texts["t2v"], **SIZE)
    assert output.result[0]["samples"].shape == (1, 32, 2, 3, 4)


def test_the_bar_moves_once_a_step_and_shows_pictures(pack, loaded, texts, monkeypatch):
    import comfy.utils
    import latent_preview

    updates = []
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, picture, **_: updates.append((done, total, picture))
    )
    pack.sampling.Sampler.execute(pipeline=loaded["t2v"], conditioning=texts["t2v"], **SIZE)
    assert [update[:2] for update in updates] == [(1, 3), (2, 3), (3, 3)]
    assert all(picture[1].size[0] >= 4 for *_, picture in updates)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"width": 100}, "width is 100; it must be a multiple of 16. Try 96 or 112."),
        ({"height": 8}, "height is 8; it must be a multiple of 16. Try 16."),
        ({"frames": 7}, "frames is 7; it must be 4n + 1. Try 5 or 9."),
        ({"frames": 0}, "Try 1 or 5."),
    ],
)
def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest(pack, loaded, texts, size, words):
    with pytest.raises(ValueError) as refusal:
        pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE | size)
    assert words in str(refusal.value)


def test_an_image_and_a_checkpoint_must_belong_together(pack, loaded, texts):
    with pytest.raises(ValueError, match="connect start_image"):
        pack.sampling.sample(loaded["i2v"], texts["i2v"], **SIZE)
    with pytest.raises(ValueError, match="takes no start_image"):
        pack.sampling.sample(loaded["t2v"], texts["t2v"], **SIZE, start_image=torch.rand(1, 48, 64, 3))


def test_encoding_a_prompt_twice_gives_the_same_tensors_on_the_cpu(pack, loaded, texts):
    again = pack.text.encode(loaded["t2v"], POSITIVE, NEGATIVE)
    for side, other in ((again.positive, texts["t2v"].positive), (again.negative, texts["t2v"].negative)):
        assert side.keys() == other.keys() and len(side) == 4
        assert all(torch.equal(side[name], other[name]) and side[name].device.type == "cpu" for name in side)
