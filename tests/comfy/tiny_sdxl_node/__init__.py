"""Test-only: teaches ComfyUI the embedded teacher, an SDXL of other widths (architecture.py).

It appends a subclass of ComfyUI's own SDXL to the models that it recognises, with the tiny text
encoders' sizes, gives the narrow VAE the explicit config that ComfyUI cannot guess, and both the
fewer norm groups of narrow networks. Two nodes tell the tests what the network was really asked.
"""

import json
from functools import wraps

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy.supported_models_base import ClipTarget

WIDTH_L, WIDTH_G, NUM_LAYERS = 32, 64, 3
VAE_WIDTH, VAE_MULTIPLIERS = 32, [1, 1, 1, 2]
NORM_GROUPS = 8


class Record:
    """Passes the model on and notes each call of its network: [timestep, rows of the batch]."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL", "TEST_RECORD")
    FUNCTION, CATEGORY = "record", "test"
    IS_CHANGED = classmethod(lambda cls, model: float("nan"))  # never from the cache

    def record(self, model):
        calls = []

        def note(executor, x, timesteps, *rest, **named):
            calls.append([float(timesteps[0]), len(x)])
            return executor(x, timesteps, *rest, **named)

        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
        return patched, calls


class Recorded:
    """Shows what was noted until `latent` was made."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"latent": ("LATENT",), "record": ("TEST_RECORD",)}}
    )
    RETURN_TYPES, OUTPUT_NODE = (), True
    FUNCTION, CATEGORY = "show", "test"

    def show(self, latent, record):
        return {"ui": {"calls": [json.dumps(record)]}}


NODE_CLASS_MAPPINGS = {"TestRecord": Record, "TestRecorded": Recorded}


def _encoder_config(width, num_heads, activation):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": num_heads,
        "num_hidden_layers": NUM_LAYERS,
        "projection_dim": width,
        "hidden_act": activation,
    }


def _regroup(network):
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = NORM_GROUPS


class TinyCLIP(comfy.sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        sizes = {
            "clip_l_model_config": _encoder_config(WIDTH_L, 1, "quick_gelu"),
            "clip_g_model_config": _encoder_config(WIDTH_G, 2, "gelu"),
        }
        super().__init__(
            device=device, dtype=dtype, model_options={**(model_options or {}), **sizes}
        )


UNET_CONFIG = {
    "model_channels": 32,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 1, 1],
    "context_dim": WIDTH_L + WIDTH_G,
    "adm_in_channels": WIDTH_G + 6 * 256,
    "use_temporal_attention": False,
}
HEADS = {"num_heads": -1, "num_head_channels": 32}


class TinySDXL(comfy.supported_models.SDXL):
    unet_config = UNET_CONFIG
    unet_extra_config = HEADS

    def get_model(self, *args, **options):
        model = super().get_model(*args, **options)
        _regroup(model.diffusion_model)
        return model

    def clip_target(self, state_dict=None):
        return ClipTarget(comfy.sdxl_clip.SDXLTokenizer, TinyCLIP)


def _vae_config(state_dict):
    """The explicit config of the tiny VAE, None for any other VAE."""
    first = state_dict.get("encoder.conv_in.weight") if state_dict else None
    if first is None or first.shape[0] != VAE_WIDTH:
        return None
    sizes = {
        **{"double_z": True, "z_channels": 4, "resolution": 128, "in_channels": 3, "out_ch": 3},
        **{"ch": VAE_WIDTH, "ch_mult": VAE_MULTIPLIERS, "num_res_blocks": 1},
        **{"attn_resolutions": [], "dropout": 0.0},
    }
    return {"params": {"ddconfig": sizes, "embed_dim": 4}}


def _with_config(original):
    @wraps(original)
    def init(self, sd=None, device=None, config=None, **rest):
        tiny = _vae_config(sd)
        original(self, sd=sd, device=device, config=config or tiny, **rest)
        if tiny is not None:
            _regroup(self.first_stage_model)

    return init


comfy.supported_models.models.append(TinySDXL)
comfy.sd.VAE.__init__ = _with_config(comfy.sd.VAE.__init__)
