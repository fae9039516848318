"""Reading LoRA files in every form that few-step LoRAs are published in, completely or not at all.

sd-scripts (`lora_unet_....lora_down.weight`, `.alpha`; modules by LDM's or diffusers' names),
diffusers and peft (`unet....lora_A.weight`, alpha in the metadata), older diffusers
(`....lora.down.weight`, `processor.to_q_lora.down.weight`). Whatever the form, modules come back
under sd-scripts names, `lora_unet_...`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2_core import Recipe

from .models.names import kohya_name
from .models.safetensors_io import read_safetensors

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# A tensor's name: its module, then which half of the product it is.
ENDS = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.(?P<plain>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)(?:\.\w+)?"
    r"|_lora\.(?P<processor>down|up))\.weight"
)
_DOWN_PARTS = ("lora_down", "lora_A", "lora.down", "down")
_PREFIXES = (
    *("base_model.model.unet.", "base_model.model.", "unet.", "model.diffusion_model."),
    "diffusion_model.",
)
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoder(_2)?\.|lora_prior_te_")
_PEFT_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraModule:
    """One module's part of a LoRA file; out += (alpha / rank) * up(down(x))."""

    down: Tensor
    """(rank, in) or (rank, in, k, k), float32."""
    up: Tensor
    """(out, rank) or (out, rank, 1, 1), float32."""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(path: str | Path) -> tuple[dict[str, LoraModule], Recipe | None]:
    """The modules of a LoRA file by their sd-scripts names, and its recipe if it has one."""
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    pairs, alphas = _sorted_out(path, tensors)
    alphas |= _alphas_elsewhere(path, metadata, pairs.keys() - alphas.keys(), tensors)
    modules = {}
    for name in sorted(pairs):
        down, up = pairs[name].get("down"), pairs[name].get("up")
        if down is None or up is None:
            raise _not_plain(path, f"no {name}{DOWN if down is None else UP}")
        module = _module(down, up, alphas.get(name))
        if module is None:
            raise ValueError(f"{path} has damaged tensors in {name}: download or export it again")
        modules[name] = module
    return modules, Recipe.from_metadata(metadata)


def _sorted_out(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """sd-scripts name -> {"down": ..., "up": ...}, and name -> alpha."""
    text = [name for name in tensors if _TEXT_ENCODER.match(name)]
    if text:
        raise ValueError(
            f"{path} has {len(text)} tensors for text encoders, which are not trained here, first "
            f"{text[0]}: use a LoRA of the UNet alone"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = ENDS.fullmatch(name)
        if found:
            part = found["plain"] or found["processor"]
            side = "down" if part in _DOWN_PARTS else "up"
            pairs.setdefault(module_name(found), {})[side] = tensor
    if not pairs:
        raise _not_plain(path, f"it has no {DOWN} tensors")
    alphas = {}
    for name, tensor in tensors.items():
        if ENDS.fullmatch(name):
            continue
        module = _sd_scripts_name(name.removesuffix(ALPHA))
        if not name.endswith(ALPHA) or module not in pairs or tensor.numel() != 1:
            raise _not_plain(path, f"it holds {name}")
        alphas[module] = float(tensor)
    return pairs, alphas


def _not_plain(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a plain LoRA ({reason}): "
        "use one exported here, or convert it to lora_down, lora_up and alpha"
    )


def module_name(found: re.Match[str]) -> str:
    """The sd-scripts name of the module that a match of `ENDS` belongs to."""
    module = found["module"]
    if found["processor"]:  # "attn1.processor.to_out_lora" belongs to "attn1.to_out.0"
        module = module.replace(".processor.", ".")
        module += ".0" if module.endswith(".to_out") else ""
    return _sd_scripts_name(module)


def _sd_scripts_name(module: str) -> str:
    if module.startswith("lora_unet_"):
        return module
    for prefix in _PREFIXES:
        if module.startswith(prefix):
            module = module.removeprefix(prefix)
            break
    return kohya_name(module)


def _alphas_elsewhere(
    path: Path, metadata: Mapping[str, str], names: set[str], tensors: Mapping[str, Tensor]
) -> dict[str, float]:
    """Alphas that are not tensors: diffusers' metadata, or peft's adapter_config.json beside it.

    Without any the scale is 1, everywhere; but peft's own names promise a config, and to go
    without it would be silently wrong.
    """
    config: dict[str, Any] = {}
    try:
        if _PEFT_METADATA in metadata:
            config = json.loads(metadata[_PEFT_METADATA])
            config = {k.removeprefix("unet."): v for k, v in config.items()}
        elif any(name.startswith("base_model.model.") for name in tensors):
            config = json.loads((path.parent / _PEFT_CONFIG).read_text(encoding="utf-8"))
        if not config:
            return {}
        alpha, pattern = float(config["lora_alpha"]), config.get("alpha_pattern") or {}
        by_name = {_sd_scripts_name(module): float(value) for module, value in pattern.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say its alpha (peft keeps it in {_PEFT_CONFIG} or in the metadata, "
            "and neither can be read): put that file beside it, or save it with diffusers again"
        ) from error
    return {name: by_name.get(name, alpha) for name in names}


def _module(down: Tensor, up: Tensor, alpha: float | None) -> LoraModule | None:
    """None unless the sizes make a low-rank product and every value is finite."""
    down, up = down.float(), up.float()
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down):
        return None
    scale = torch.tensor(float(len(down)) if alpha is None else alpha)
    finite = all(bool(tensor.isfinite().all()) for tensor in (down, up, scale))
    return LoraModule(down=down, up=up, alpha=float(scale)) if finite else None
