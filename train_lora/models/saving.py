"""A model to a diffusers folder or to one single file that ComfyUI loads."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .components import Components, Kind
from .convert import components_to_file
from .infer import head_width, norm_groups
from .safetensors_io import write_safetensors
from .sd15_config import NUM_HEADS

ARCHITECTURES: dict[Kind, str] = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd15": "stable-diffusion-v1",
}
"""sai_model_spec's names."""


def save_diffusers_folder(components: Components, path: str | Path) -> None:
    """A folder for diffusers' `from_pretrained`, in the networks' own dtypes.

    It appears whole or not at all; an existing folder must be empty.
    """
    from safetensors import SafetensorError

    _refuse_flow(components)

    assert not getattr(components.unet, "peft_config", None), "save before adding adapters"
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: choose another folder or remove it")
    pipeline = _pipeline(components)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        try:
            pipeline.save_pretrained(Path(temporary) / "model")
        except SafetensorError as error:  # what the system refuses, a full disk for one
            raise ValueError(
                f"{path} cannot be written ({error}): make room, or name another folder"
            ) from error
        if path.exists():
            path.rmdir()
        (Path(temporary) / "model").rename(path)


def _refuse_flow(components: Components) -> None:
    """No pipeline of SDXL or SD1.5, and no mark in a single file, tells that a model is of flow."""
    if components.prediction == "flow":
        raise ValueError(
            f"{components.name} predicts flow, which a saved checkpoint cannot say, so that "
            'programs would take it for another kind: train a LoRA instead (student.kind "lora")'
        )


def _pipeline(components: Components) -> Any:
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    parts: dict[str, Any] = {
        "vae": components.vae,
        "unet": components.unet,
        "text_encoder": components.text_encoders[0],
        "tokenizer": components.tokenizers[0],
        "scheduler": EulerDiscreteScheduler(**_scheduler_config(components)),
    }
    if components.kind == "sd15":
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=components.text_encoders[1],
        tokenizer_2=components.tokenizers[1],
        add_watermarker=False,
    )


def _scheduler_config(components: Components) -> dict[str, Any]:
    """Stable Diffusion's own, with this model's prediction and terminal SNR."""
    zero_snr = components.schedule.has_zero_terminal_snr
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": components.schedule.num_timesteps,
        "prediction_type": "v_prediction"
        if components.prediction == "v"
        else components.prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "steps_offset": 1,
    }


def save_single_file(
    components: Components,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """One file in the original format, all tensors in `dtype` (float16 or float32).

    Equal models give equal bytes. The file cannot hold the numbers of attention heads and norm
    groups nor another schedule than SDXL's: a model that loading it would misread is refused.
    `metadata` is added to the file's own.
    """
    path = Path(path)
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"dtype is {dtype}: save in torch.float16 or torch.float32")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: choose another name or remove it")
    check_conventions(components)
    tensors = {name: tensor.to(dtype) for name, tensor in components_to_file(components).items()}
    tensors |= {mark: torch.zeros(0, dtype=dtype) for mark in _marks(components)}
    write_safetensors(path, tensors, _metadata(components) | dict(metadata or {}))


def check_conventions(components: Components) -> None:
    """ValueError where a single file of this model would be misread."""
    _marks(components)
    unet, encoders = components.unet.config, components.text_encoders
    width = head_width(unet.block_out_channels[0])
    pairs: list[tuple[int, int]] = []
    if components.kind == "sdxl":
        pairs = list(zip(unet.block_out_channels, unet.attention_head_dim, strict=True))
    elif unet.attention_head_dim != NUM_HEADS:
        raise ValueError(
            f"{unet.attention_head_dim} attention heads cannot be told from a single file, which "
            f"means {NUM_HEADS}: save a diffusers folder"
        )
    pairs += [(e.config.hidden_size, e.config.num_attention_heads) for e in encoders]
    for channels, heads in pairs:
        if channels != heads * width:
            raise ValueError(
                f"{heads} attention heads on {channels} channels cannot be told from a single "
                f"file, which means {width} channels per head: save a diffusers folder"
            )
    for config in (unet, components.vae.config):
        means = norm_groups(config.block_out_channels[0])
        if config.norm_num_groups != means:
            raise ValueError(
                f"{config.norm_num_groups} groups in a norm cannot be told from a single file, "
                f"which means {means} here: save a diffusers folder"
            )


def _marks(components: Components) -> list[str]:
    """The empty tensors by which ComfyUI knows v-prediction and zero terminal SNR."""
    _refuse_flow(components)
    kind = (components.prediction, components.schedule.has_zero_terminal_snr)
    known = {
        ("epsilon", False): [],
        ("v", False): ["v_pred"],
        ("v", True): ["v_pred", "ztsnr"],
    }
    if kind not in known:
        raise ValueError(
            f"prediction {kind[0]!r} with zero terminal SNR {kind[1]} has no mark in a single "
            "file: save a diffusers folder"
        )
    return known[kind]


def _metadata(components: Components) -> dict[str, str]:
    side_px = components.vae.config.sample_size
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[components.kind],
        "modelspec.implementation": "sgm",
        "modelspec.title": components.name,
        "modelspec.prediction_type": components.prediction,
        "modelspec.resolution": f"{side_px}x{side_px}",
    }
