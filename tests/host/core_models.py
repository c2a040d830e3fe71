"""Core's own model of the VAE at reduced width, with random weights."""

import math

import torch

WIDTHS = (8, 16, 32, 64, 64)
REFINER = "comfy.ldm.hunyuan_video.vae_refiner"


CONFIG = {"block_out_channels": list(WIDTHS), "in_channels": 3, "out_channels": 3, "num_res_blocks": 2}
CONFIG |= {"ffactor_spatial": 16, "ffactor_temporal": 4, "z_channels": 32}


def engine(**_):
    """Core's own model class, at reduced width, in place of the one of full size that core's VAE makes."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    return AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        encoder_config={"target": f"{REFINER}.Encoder", "params": CONFIG},
        decoder_config={"target": f"{REFINER}.Decoder", "params": CONFIG},
    )


def core_model(pack):
    """Core's own model with random weights. What no layer uses is as core leaves it: memory that was never written."""
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
    """What a checkpoint holds of core's model, which may have tensors that no layer uses."""
    return {key: tensor for key, tensor in model.state_dict().items() if "temb_proj" not in key}
