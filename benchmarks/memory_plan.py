"""How many bytes a training iteration holds at most, counted without having them.

The steps of `distill.py` run on tensors that have a shape and no memory; every storage that comes
and goes is counted. What is not in it: the libraries' workspaces, the allocator's gaps, the driver
(0.5 to 1 GiB together), and that some norms compute in float32 under CUDA's autocast.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dmd2_core import MiddleBlockHead, VPSchedule
from train_lora.config import Config
from train_lora.demo import architecture
from train_lora.distill import Batch, Distiller, RealImages
from train_lora.draws import sample_draws
from train_lora.model_setup import autocast_dtype
from train_lora.models.components import Components, Kind
from train_lora.models.roles import CRITIC, STUDENT, FullSpec, LoraSpec, SharedUNet
from train_lora.models.text import LATENT_PX, Condition
from train_lora.sampling import step_plan

from .random_model import meta_unet

GIB = 2**30
EIGHT_BIT_MIN, EIGHT_BIT_BLOCK = 4096, 256
"""8-bit states: from so many numbers on, with a float32 scale for each block of so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes on the GPU."""

    resident: dict[str, int]
    """What stays there between iterations, by name."""
    peaks: dict[str, int]
    """The most that is there during each step, resident bytes included."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes of all tensors made in it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def restart(self) -> None:
        """From here on a new peak."""
        self.peak = self.live

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _ShapeSchedule(VPSchedule):
    """Looks up no timesteps: they have no values here."""

    __slots__ = ()

    def _abar(self, t: Tensor) -> Tensor:
        return torch.full(t.shape, 0.5, dtype=torch.float64)


def plan(config: Config, kind: str) -> Plan:
    """`kind`: "sdxl" and "sd15" at full size, "tiny" for the embedded teacher's structure."""
    if config.model.base_precision in ("8bit", "4bit"):
        raise ValueError(
            f'model.base_precision is "{config.model.base_precision}", whose bytes only a run on '
            "the hardware tells: leave --plan out"
        )
    fake, memory = FakeTensorMode(allow_non_fake_inputs=True), LiveMemory()
    unet = _unet(config, kind)
    side = config.data.resolution_px // LATENT_PX
    head: nn.Module = nn.Identity()
    if config.gan.enabled:
        with torch.device("meta"):
            head = MiddleBlockHead(unet.feature_channels, side // unet.feature_downscale)
    resident: dict[str, int] = {}
    parts = {"frozen base": unet.unet, **{f"{r}'s weights": c for r, c in unet.copies.items()}}
    for name, module in (*parts.items(), ("discriminator head", head)):
        resident[name] = _give_shapes(module, fake, memory)
    student, critic = unet.parameters_of(STUDENT), unet.parameters_of(CRITIC)
    adapters = {role: unet.parameters_of(role) for role in unet.adapters}
    if adapters:
        num = sum(_num_bytes(weights) for weights in adapters.values())
        resident["frozen base"] -= num
        resident["LoRA adapters"] = num
    optimizer = config.training.optimizer
    extra = {
        "student's average": _num_bytes(student),
        "student's optimizer": optimizer_bytes(student, optimizer),
        "critic's optimizer": optimizer_bytes(critic, optimizer),
        "head's optimizer": optimizer_bytes(head.parameters(), optimizer),
    }
    resident |= extra
    peaks = _step_peaks(config, kind, unet, head, fake, memory)
    constant = sum(extra.values())
    return Plan(
        resident={name: num for name, num in resident.items() if num},
        peaks={name: num + constant for name, num in peaks.items()},
    )


def optimizer_bytes(parameters: Any, name: str) -> int:
    """Of AdamW's two states, float32 or in 8 bits."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if name == "adamw" or count < EIGHT_BIT_MIN:
            total += 2 * 4 * count
        else:
            total += 2 * (count + 4 * -(-count // EIGHT_BIT_BLOCK))
    return total


def memory_plan(config: Config, kind: str) -> str:
    """`plan` as a markdown table."""
    found = plan(config, kind)
    training = config.training
    lines = [
        f"{kind}, {config.data.resolution_px} px, batch {training.batch_size}, rank "
        f"{config.student.rank}, {training.optimizer}, checkpointing "
        f"{'on' if training.gradient_checkpointing else 'off'}; computed, not measured",
        "",
        "| on the GPU | GiB |",
        "|---|---|",
        *(f"| {name} | {num / GIB:.2f} |" for name, num in found.resident.items()),
        f"| **between iterations** | **{sum(found.resident.values()) / GIB:.2f}** |",
        *(f"| at most during {name} | {num / GIB:.2f} |" for name, num in found.peaks.items()),
    ]
    return "\n".join(lines)


def _unet(config: Config, kind: str) -> SharedUNet:
    """In its roles, on the meta device."""
    from accelerate import init_empty_weights

    if kind == "tiny":
        with init_empty_weights():
            base = architecture.build_unet()
    else:
        base = meta_unet("sd15" if kind == "sd15" else "sdxl")
    specs = {
        role: FullSpec()
        if section.kind == "full"
        else LoraSpec(rank=section.rank, alpha=section.alpha)
        for role, section in ((STUDENT, config.student), (CRITIC, config.critic))
    }
    chosen = config.model.base_precision
    automatic = "bf16" if config.training.mixed_precision == "bf16" else "fp32"
    unet = SharedUNet(
        base,
        specs,
        seed=0,
        precision=automatic if chosen == "auto" else chosen,
        autocast=autocast_dtype(config),
    )
    if config.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _give_shapes(module: nn.Module, fake: FakeTensorMode, memory: LiveMemory) -> int:
    """Parameters and buffers without memory, but counted; returns their bytes."""
    before = memory.live
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in list(tensors.items()):
                if old is None:
                    continue
                with fake, memory:
                    new = torch.empty(old.shape, dtype=old.dtype)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                tensors[name] = new
    return memory.live - before


def _num_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _step_peaks(
    config: Config,
    kind: str,
    unet: SharedUNet,
    head: nn.Module,
    fake: FakeTensorMode,
    memory: LiveMemory,
) -> dict[str, int]:
    """What `loop.Trainer.iterate` does with its last accumulated batch, which finds the gradients
    of the others. Without the rollout: it keeps nothing, and needs less than what follows."""
    sd15 = kind == "sd15"
    components = Components(
        unet=unet.unet,
        vae=None,  # type: ignore[arg-type]
        text_encoders=[],
        tokenizers=[],
        schedule=_ShapeSchedule(VPSchedule.sdxl().alphas_cumprod),
        prediction="epsilon",
        kind="sd15" if sd15 else "sdxl",
        base_hash="",
        name="plan",
        empty_prompt=torch.empty(1) if sd15 else None,
    )
    distiller = Distiller(
        unet=unet, head=head, components=components, plan=step_plan(config), config=config
    )
    count, peaks = config.training.batch_size, {}
    accumulates = config.training.gradient_accumulation_steps > 1

    def begin(trained: Sequence[nn.Parameter]) -> None:
        for parameter in trained if accumulates else ():
            parameter.grad = torch.empty_like(parameter)
        memory.restart()

    def record(name: str) -> None:
        peaks[name] = memory.peak
        memory.restart()

    with fake, memory:
        batch = _batch(config, unet, components.kind)
        draws = sample_draws(0, first=0, count=count)
        begin(unet.parameters_of(STUDENT))
        sample = distiller.student_sample(batch, 0, draws, with_graph=True)
        record("the student's sample")
        distiller.generator_step(sample, draws)
        record("the generator step")
        sample = sample.detached()
        unet.zero_grad(set_to_none=True)
        begin([*unet.parameters_of(CRITIC), *head.parameters()])
        distiller.critic_step(sample, batch, draws)
        record("the critic step")
    return peaks


def _batch(config: Config, unet: SharedUNet, kind: Kind) -> Batch:
    count, side = config.training.batch_size, config.data.resolution_px // LATENT_PX
    sizes = unet.unet.config
    pooled = 0
    if kind == "sdxl":
        pooled = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim

    class Shaped(Condition):
        """Knows its size without reading a tensor's values."""

        __slots__ = ()

        def latent_shape(self, channels: int = 4) -> tuple[int, int, int, int]:
            return len(self), channels, side, side

    def condition() -> Condition:
        return Shaped(
            hidden=torch.empty(count, 77, sizes.cross_attention_dim),
            pooled=torch.empty(count, pooled),
            time_ids=torch.empty(count, 6),
        )

    latents = torch.empty(count, sizes.in_channels, side, side)
    real = RealImages(latents=latents, condition=condition()) if config.needs_real_images else None
    return Batch(condition=condition(), real=real)
