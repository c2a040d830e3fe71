"""Core's own VAE model at reduced width, with random weights."""

import math

import torch

WIDTHS = (8, 16, 32, 64, 64)
REFINER = "comfy.ldm.hunyuan_video.vae_refiner"


CONFIG = {"block_out_channels": list(WIDTHS), "in_channels": 3, "out_channels": 3, "num_res_blocks": 2}
CONFIG |= {"ffactor_spatial": 16, "ffactor_temporal": 4, "z_channels": 32}


def engine(**_):
    """Return core's model at reduced width. It replaces the full-size model that core's VAE creates."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        encoder_config={"target": f"{REFINER}.Encoder", "params": CONFIG},
        decoder_config={"target": f"{REFINER}.Decoder", "params": CONFIG},
    )


def core_model(pack):
    """Return core's model with random weights. Unused tensors are NaN, because core leaves them uninitialised."""
    torch.manual_seed(1)
    model = engine().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "temb_proj" in name:
            parameter.fill_(float("nan"))
        elif name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.02)
    return model


def weights_of(model):
    """Return the tensors that a checkpoint contains. Core's model may have others, which no layer uses."""
    return {key: tensor for key, tensor in model.state_dict().items() if "temb_proj" not in key}
