"""Forms of diffusers' layers for training are the same functions, and the miniature's parts and files."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline

from miniature import footage, parts, text, world
from miniature.training import forms


@pytest.fixture(scope="module")
def encoders():
    return text.encoders()


@pytest.fixture(scope="module")
def transformer():
    """A transformer without zeros, other than those of the glyph embedder."""
    torch.manual_seed(0)
    model = parts.new_transformer(num_layers=2).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any():
                weight.normal_(std=0.05)
            for axis in parts.glyph_axes(name):
                weight.narrow(axis, parts.GLYPH_WIDTH, weight.shape[axis] - parts.GLYPH_WIDTH).zero_()
    return model


def inputs(batch: int) -> dict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    lengths, quoted = torch.tensor([5, 9, 3])[:batch, None], torch.tensor([2, 0, 6])[:batch, None]
    return {
        "latents": draw(65, 2, 3, 4),
        "timestep": torch.tensor([900.0, 500.0, 20.0])[:batch],
        "text": (draw(9, text.WIDTH), torch.arange(9) < lengths),
        "glyphs": (draw(6, text.WIDTH), torch.arange(6) < quoted),
        "image": (draw(5, text.WIDTH), torch.ones(batch, 5, dtype=torch.bool)),
    }


def test_the_vaes_training_forms_give_diffusers_results_for_a_batch():
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(**parts.VAE_CONFIG).eval()
    clips = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if name.endswith("gamma"):
                weight.uniform_(0.5, 1.5)
        one_by_one = torch.cat([vae(clip).sample for clip in clips.split(1)])
        with forms.training_forms():
            batch = forms.channels_last(vae)(clips).sample
        again = vae(clips[:1]).sample
    assert (batch - one_by_one).abs().max() < 1e-4 * one_by_one.abs().max()
    assert (again - one_by_one[:1]).abs().max() < 1e-4 * one_by_one.abs().max()


def test_attention_without_the_causal_order_would_be_noticed(monkeypatch):
    torch.manual_seed(0)
    block = forms.vae_layers.HunyuanVideo15AttnBlock(32).eval()
    x = torch.randn(1, 32, 3, 4, 5)
    with torch.no_grad():
        expected = block(x)
        assert (forms.causal_attention(block, x) - expected).abs().max() < 1e-5
        monkeypatch.setattr(block, "prepare_causal_attention_mask", lambda *_, **__: None)
        assert (block(x) - expected).abs().max() > 1e-3


def test_the_padding_and_its_gradient_are_those_of_replication():
    x = torch.randn(2, 3, 3, 4, 5, dtype=torch.double, requires_grad=True)
    ours, theirs = forms.CausalPadding.apply(x), F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    assert torch.equal(ours, theirs)
    gradient = torch.randn(ours.shape, dtype=torch.double)
    expected = torch.autograd.grad(theirs, x, gradient)[0]
    assert (torch.autograd.grad(ours, x, gradient)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("images", [True, False], ids=["with images", "without images"])
def test_the_transformers_training_form_gives_diffusers_result(transformer, images):
    batch = inputs(3)
    embeddings, valid = batch["image"]
    batch["image"] = (embeddings * images, valid & images)
    names = {"text": "encoder_hidden_states", "glyphs": "encoder_hidden_states_2"}
    masks = {"text": "encoder_attention_mask", "glyphs": "encoder_attention_mask_2"}
    theirs = {names[key]: batch[key][0] for key in names} | {masks[key]: batch[key][1].float() for key in masks}
    with torch.no_grad():
        expected = transformer(
            hidden_states=batch["latents"], timestep=batch["timestep"], image_embeds=batch["image"][0], **theirs
        ).sample
        processors = transformer.attn_processors
        forms.set_key_masks(transformer)
        ours = forms.velocity(transformer, **batch)
        transformer.set_attn_processor(processors)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_transformer_gives_other_videos_with_and_without_an_image(transformer):
    batch = inputs(1)
    processors = transformer.attn_processors
    forms.set_key_masks(transformer)
    with torch.no_grad():
        one = forms.velocity(transformer, **batch)
        batch["image"] = (batch["image"][0], ~batch["image"][1])
        assert (forms.velocity(transformer, **batch) - one).abs().max() > 1e-4
    transformer.set_attn_processor(processors)


def test_the_unused_channels_of_the_glyph_embedder_have_no_gradient(transformer):
    processors = transformer.attn_processors
    forms.set_key_masks(transformer)
    forms.velocity(transformer, **inputs(3)).square().mean().backward()
    transformer.set_attn_processor(processors)
    for name, weight in transformer.context_embedder_2.named_parameters():
        for axis in parts.glyph_axes(f"context_embedder_2.{name}"):
            unused = weight.grad.narrow(axis, parts.GLYPH_WIDTH, weight.shape[axis] - parts.GLYPH_WIDTH)
            assert not unused.any() and weight.grad.any()
    transformer.zero_grad()


def test_files_hold_what_was_trained_in_at_most_12_megabytes(tmp_path):
    for name, model, other in (
        ("vae", parts.new_vae(), parts.new_vae()),
        ("transformer", parts.new_transformer(), parts.new_transformer()),
    ):
        parts.save_weights(model, tmp_path / name)
        parts.load_weights(other, tmp_path / name)
        for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(one.half().float(), two)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12e6


def test_a_new_transformer_predicts_zero_and_leaves_its_tokens_unchanged():
    model = parts.new_transformer(num_layers=1)
    forms.set_key_masks(model)
    with torch.no_grad():
        assert not forms.velocity(model, **inputs(2)).any()


def test_each_word_of_the_captions_is_one_token_and_other_text_is_bytes(encoders):
    reader = encoders["tokenizer"]

    def tokens(prompt: str) -> list[str]:
        return [reader.decode([number]) for number in reader(prompt)["input_ids"]]

    assert tokens("a red circle moves left") == ["a", " red", " circle", " moves", " left"]
    assert tokens("Red square, still") == ["Red", " square", ",", " still"]
    for prompt in ("a golden zebra", "ein Kaninchen läuft 🐇", "\n\t", "redder"):
        assert "".join(reader.decode(reader(prompt)["input_ids"])) == prompt
    captions = [world.Clip("star", "red", motion, wording=i).caption for motion in world.MOTIONS for i in range(12)]
    for caption in (*captions, *footage.CAPTIONS):
        assert len(tokens(caption)) <= 2 * len(caption.split()) + 1


def test_the_list_of_words_is_that_of_the_captions():
    clips = [
        world.Clip(shape, colour, motion, background, letter, wording=wording)
        for shape, colour, motion in world.combinations(held_out=False)
        for background in world.BACKGROUNDS
        for letter in ("", "K")
        for wording in range(12)
    ]
    captions = [*footage.CAPTIONS, *(clip.caption for clip in clips)]
    assert {word for caption in captions for word in re.findall(r"[a-z]{2,}", caption.lower())} == set(text.WORDS)


def test_the_pipelines_crop_leaves_the_prompt_and_nothing_before_it(encoders):
    reader = encoders["tokenizer"]
    defaults = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__defaults__
    message = next(value for value in defaults if isinstance(value, str))
    crop_start = defaults[-1]
    chat = [{"role": "system", "content": message}, {"role": "user", "content": "a red circle"}]
    numbers = reader.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert reader.decode(numbers[crop_start:]).startswith("a red circle<|im_end|>")
    assert not reader.decode(numbers[:crop_start]).endswith("a")


def test_spellings_of_a_word_have_the_same_vector_and_words_have_different_ones(encoders):
    reader, vectors = encoders["tokenizer"], encoders["text_encoder"].embed_tokens.weight
    first = [vectors[reader.convert_tokens_to_ids(text.spellings(word)[0])] for word in text.WORDS]
    for word, vector in zip(text.WORDS, first, strict=True):
        for spelling in text.spellings(word):
            assert torch.equal(vectors[reader.convert_tokens_to_ids(spelling)], vector)
    angles = F.normalize(torch.stack(first), dim=1) @ F.normalize(torch.stack(first), dim=1).T
    assert (angles - torch.eye(len(first))).abs().max() < 0.6


def test_the_encoders_are_the_same_on_every_machine(encoders, monkeypatch):
    assert text.digest(encoders) == text.DIGEST
    monkeypatch.setattr(text, "WIDTH", 32)
    with pytest.raises(ValueError, match=f"and {text.DIGEST} on other machines"):
        text.encoders()
