"""The pack's nodes load and sample what the miniature's training writes."""

import pytest
import torch

from miniature import parts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as training leaves it, with untrained weights."""
    folder = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    parts.save_weights(parts.new_vae(), folder / parts.VAE_FILE)
    parts.save_settings(folder, vae=parts.VAE_CONFIG | {"scaling_factor": 0.8}, transformer=parts.TRANSFORMER_CONFIG)
    transformer = parts.new_transformer()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    parts.save_weights(transformer, folder / parts.TRANSFORMER_FILE)
    return folder


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_nodes_sample_the_pipelines_latents(pack, trained, tmp_path, kind):
    pipeline = parts.pipeline(kind, trained)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = pack.loading.load_pipeline(tmp_path / "model", torch.float32, "model")
    prompt = 'a red circle moves left with the letter "K"'
    image = torch.rand(1, 96, 160, 3, generator=torch.Generator().manual_seed(0)) if kind == "i2v" else None
    options = {"width": 160, "height": 96, "frames": 5, "steps": 2, "guidance": 6.0, "shift": 5.0, "seed": 1}
    latents = pack.sampling.sample(loaded, pack.text.encode(loaded, prompt, ""), **options, start_image=image)
    assert latents.shape == (1, 32, 2, 6, 10) and torch.isfinite(latents).all()
    other = pack.sampling.sample(loaded, pack.text.encode(loaded, "🐇 unknown words", ""), **options, start_image=image)
    assert torch.isfinite(other).all()
    if kind == "t2v":
        with torch.no_grad():
            expected = pipeline(
                prompt=prompt,
                negative_prompt="",
                height=96,
                width=160,
                num_frames=5,
                num_inference_steps=2,
                generator=torch.Generator("cpu").manual_seed(1),
                output_type="latent",
            ).frames
        assert (latents - expected / 0.8).abs().max() < 1e-3 * expected.abs().max()
