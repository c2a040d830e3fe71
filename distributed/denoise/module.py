"""The fast transformer with the interface of the transformer in diffusers' pipelines."""

import copy

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .conditions import Context, trim
from .loading import streamed
from .transformer import Modulation, OnBlock, Transformer


def fast_module(model: nn.Module, on_block: OnBlock | None = None, stream_to: torch.device | None = None) -> nn.Module:
    """Return a shallow copy of a HunyuanVideo15Transformer3DModel with the same weights and hooks but the fast forward.

    The model itself is not changed. The copy caches results for conditions and timesteps for its lifetime, so each
    sampling run needs its own. on_block: see `transformer.OnBlock`. stream_to: the device of the computation if the
    weights stay in host memory (see `loading.streamed`); None: the device of the weights.
    """
    shell = copy.copy(model)
    transformer = Transformer(model)  # refuses adapters
    if stream_to is not None:
        transformer = streamed(model, stream_to)
    shell.forward = _Forward(transformer, on_block)
    return shell


class _Forward:
    """diffusers' forward. It caches by the identity of inputs: a pipeline passes the same tensors in every step."""

    def __init__(self, transformer: Transformer, on_block: OnBlock | None) -> None:
        self.transformer, self.on_block = transformer, on_block
        self._contexts: list[tuple[tuple[Tensor, ...], list[Context]]] = []
        self._modulation: tuple[tuple[Tensor | None, ...], list[Modulation]] = (), []

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """See HunyuanVideo15Transformer3DModel.forward. attention_kwargs is ignored: it concerns adapters only."""
        contexts = self._contexts_of(
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_hidden_states_2,
            encoder_attention_mask_2,
            image_embeds,
        )
        modulations = self._modulation_of(timestep, timestep_r)
        predictions = []
        for i, (latent, context, modulation) in enumerate(zip(hidden_states, contexts, modulations, strict=True)):
            rows = self.transformer.forward(latent, timestep[i : i + 1], context, modulation, on_block=self.on_block)
            predictions.append(self.transformer.unpatchify(rows, latent))
        sample = torch.stack(predictions)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _contexts_of(self, *conditions: Tensor) -> list[Context]:
        for seen, contexts in self._contexts:
            if _same(seen, conditions):
                return contexts
        contexts = [self.transformer.encode(condition) for condition in trim(*conditions)]
        self._contexts.append((conditions, contexts))
        return contexts

    def _modulation_of(self, *timesteps: Tensor | None) -> list[Modulation]:
        if not _same(self._modulation[0], timesteps):
            self._modulation = timesteps, self.transformer.modulation(*timesteps)
        return self._modulation[1]


def _same(one: tuple, other: tuple) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
