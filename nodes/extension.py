"""The pack's list of nodes, as ComfyUI's V3 API wants it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import Compare
from .conditioning_timestep import ConditioningTimestep
from .ksampler_patch import KSamplerPatch
from .load_lora import LoadLoRA
from .merge_check import MergeCheck
from .sample import Sample
from .sampler import Sampler
from .scheduler import Scheduler


class DMD2Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadLoRA,
            Sample,
            Scheduler,
            Sampler,
            ConditioningTimestep,
            KSamplerPatch,
            Compare,
            MergeCheck,
        ]
