"""Guidance step by step: ComfyUI's guider with classifier-free guidance at chosen noise levels and
the attention guidance of nag.py at the others."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import comfy.model_base
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from .attention_guidance import AttentionGuidance

Conditioning = list[list[Any]]


def parse_guidance_steps(text: str, num_steps: int) -> tuple[int, ...]:
    """The steps in "1, 2" (commas, semicolons or spaces), counted from 1; all for an empty text."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,4}", word) or not 1 <= int(word) <= num_steps:
            raise ValueError(
                f"guidance_steps has {word!r}, but {num_steps} step{'s' * (num_steps != 1)} "
                f"run{'s' * (num_steps == 1)}: list numbers from 1 to {num_steps}, or leave it "
                "empty for all"
            )
    return tuple(sorted(set(map(int, words)))) or tuple(range(1, num_steps + 1))


class FewStepGuider(comfy.samplers.CFGGuider):
    """CFG 1 (one pass), but for `guided_levels`; with `attention` where CFG is 1."""

    def __init__(
        self,
        model: Any,
        positive: Conditioning,
        negative: Conditioning | None,
        *,
        guidance: float = 1.0,
        guided_levels: Collection[float] = (),
        nag_scale: float = 1.0,
    ) -> None:
        """`guided_levels`: the sigmas at which `guidance` acts, with `negative` or else the zeros
        that SDXL was trained with. `nag_scale` 1 or no negative: the model is left as it is.
        ValueError if another model than SDXL has guidance and no negative."""
        if guided_levels and negative is None:
            if not has_zero_unconditional(model):
                raise ValueError(
                    f"guidance is {guidance:g} but there is no negative prompt, which this kind of "
                    "model needs for it: connect a CLIP Text Encode (its text may be empty), or "
                    "set guidance to 1"
                )
            negative, nag_scale = zeroed(positive), 1.0
        self.attention: AttentionGuidance | None = None
        if negative is not None and nag_scale != 1.0:
            self.attention = AttentionGuidance(nag_scale)
            model = model.clone()
            self.attention.install(model)
        super().__init__(model)
        self.guidance = guidance
        self.guided_levels = tuple(guided_levels)
        conditions = {"positive": positive}
        if negative is not None:
            conditions["negative"] = negative
        self.inner_set_conds(conditions)

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """x0 for `x`: (B, C, H, W) at the noise level `timestep`: (B,)."""
        sigma = float(timestep[0]) if self.guided_levels or self.attention else 0.0
        is_guided = any(math.isclose(sigma, level, rel_tol=1e-5) for level in self.guided_levels)
        self.set_cfg(self.guidance if is_guided else 1.0)
        if self.attention is None:
            return super().predict_noise(x, timestep, model_options or {}, seed)
        self.attention.negative = None if is_guided else self.negative_tokens(len(x), sigma)
        try:
            return super().predict_noise(x, timestep, model_options or {}, seed)
        finally:
            self.attention.negative = None

    def negative_tokens(self, num_images: int, sigma: float) -> Tensor | None:
        """The negative prompt as the network's context: (num_images, tokens, width), or None.

        Combined negatives that are in force at this noise level follow each other. Their areas and
        masks do not matter: attention is guided in the whole picture.
        """
        found: dict[int, Tensor] = {}
        for entry in self.conds["negative"]:
            starts, ends = entry.get("timestep_start"), entry.get("timestep_end")
            in_force = (starts is None or sigma <= starts) and (ends is None or sigma >= ends)
            context = entry["model_conds"].get("c_crossattn")
            if in_force and context is not None:
                # ComfyUI repeats an entry for each area of the positive: the same tensor again.
                found[id(context.cond)] = comfy.utils.repeat_to_batch_size(context.cond, num_images)
        return torch.cat(list(found.values()), dim=1) if found else None


def has_zero_unconditional(model: Any) -> bool:
    """Whether the model was trained with zeros in place of an empty prompt: SDXL."""
    return isinstance(model.model, comfy.model_base.SDXL)


def zeroed(conditioning: Conditioning) -> Conditioning:
    """SDXL's unconditional branch: zeros for both embeddings, all else as in `conditioning`."""
    result = []
    for tensor, entry in conditioning:
        pooled = entry.get("pooled_output")
        zeros = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
        result.append([torch.zeros_like(tensor), entry | zeros])
    return result
