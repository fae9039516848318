"""The pack's list of nodes, as ComfyUI's V3 API wants it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .conditioning_timestep import ConditioningTimestep
from .ksampler_patch import KSamplerPatch
from .load_lora import LoadLoRA
from .sampler import Sampler
from .scheduler import Scheduler


class DMD2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadLoRA, Scheduler, Sampler, ConditioningTimestep, KSamplerPatch]
