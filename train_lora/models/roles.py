"""One frozen UNet in several roles: adapters off is the teacher, each adapter is another network.

A role may also be a full copy of the base with float32 weights of its own: the same interface, five
times the memory. The order of work in a training step should need no switch between a forward and
its backward (`dmd2_core.losses.sample_gradient`); under gradient checkpointing the recomputation
re-activates the role of its forward all the same, because the wrong one would go unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import TARGETS, LoraSpec, add_adapter, initialise, lora_layers
from .class_condition import AnyCondition
from .passes import MIDDLE, LayerShape, Passes, passes_of
from .precision import Precision, set_precision

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["CRITIC", "STUDENT", "TARGETS", "TEACHER", "FullSpec", "LoraSpec", "SharedUNet"]

TEACHER, STUDENT, CRITIC = "teacher", "student", "critic"
_MAX_COMPILED_VARIANTS = 64
"""Widths x roles x (with, without gradient): more than the 8 that dynamo allows by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullSpec:
    """A role that is a full copy of the base: all its weights, in float32, are trained."""


class SharedUNet(nn.Module):
    """A frozen base UNet with one float32 adapter (or copy) per role; outside `role` the teacher.

    `requires_grad` is set here once (base off, all else on) and never touched again: flags
    select kernels and so the last bits of a result. The base may be of any precision; inputs are
    cast to it and outputs to the dtype of `x_t`. Move it with `.to(device)`, never to another
    dtype.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        roles: Mapping[str, LoraSpec | FullSpec],
        *,
        seed: int,
        precision: Precision | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """`roles`: name -> size; "down" drawn from (seed, role, module), "up" zero.

        `precision`: of the base, None for what it has; copies are taken before it is lowered.
        `autocast`: dtype of every pass through any role, None to leave that to the caller.
        """
        super().__init__()
        assert TEACHER not in roles
        assert not getattr(unet, "peft_config", None), "a UNet is shared once"
        full = [role for role, spec in roles.items() if isinstance(spec, FullSpec)]
        copies = {role: copy.deepcopy(unet).float().requires_grad_(True) for role in full}
        unet.requires_grad_(False)
        base = unet if precision is None else set_precision(unet, precision)
        self.passes = nn.ModuleDict(
            {role: passes_of(network) for role, network in {TEACHER: base, **copies}.items()}
        )
        self.adapters = {r: spec for r, spec in roles.items() if isinstance(spec, LoraSpec)}
        self.needs_all_processes = False
        """Whether copies are sharded, so that every process must take part in their passes."""
        self._autocast_dtype = autocast
        with torch.random.fork_rng(devices=[]):  # peft draws weights of its own first
            for role, spec in self.adapters.items():
                add_adapter(unet, role, spec)
        self._layers = dict(lora_layers(unet))
        for role in self.adapters:
            for module, down, up in self.pairs_of(role):
                initialise(down, up, f"{seed}/{role}/{module}")
        self._role = ""
        self._activate(TEACHER)

    # Roles

    @property
    def active_role(self) -> str:
        return self._role

    @property
    def roles(self) -> list[str]:
        """All names that `role` takes, the teacher first."""
        return [TEACHER, *self.adapters, *self.copies]

    def network_of(self, role: str) -> UNet2DConditionModel:
        """The network that runs in this role: its copy, or the shared base."""
        return self.passes_of(role).unet

    @property
    def unet(self) -> UNet2DConditionModel:
        """The shared base."""
        return self.passes_of(TEACHER).unet

    @property
    def copies(self) -> dict[str, UNet2DConditionModel]:
        """Role -> its copy, for the roles that have one."""
        return {role: self.passes_of(role).unet for role in self.passes if role != TEACHER}

    def passes_of(self, role: str) -> Passes:
        """What runs in this role: its copy, or the shared base."""
        return self.passes[role if role in self.passes else TEACHER]  # type: ignore[return-value]

    @property
    def modules_with_adapter(self) -> list[str]:
        """diffusers' names of the adapted modules, in the order of the network."""
        return list(self._layers)

    def role(self, name: str) -> RoleScope:
        """`with unet.role("student"): ...`; restores the role before it, and nests."""
        if name not in self.roles:
            known = ", ".join(self.roles)
            raise ValueError(f"role {name!r} is unknown: use one of {known}")
        return RoleScope(self, name)

    def _activate(self, name: str) -> None:
        if name == self._role:
            return
        if name not in self.copies:
            # peft's set_adapter and enable_adapters would also set requires_grad, 20 times slower.
            settings = {"_active_adapter": [name], "_disable_adapters": name == TEACHER}
            if name == TEACHER:
                del settings["_active_adapter"]
            for layer in self._layers.values():
                layer.__dict__.update(settings)
        self._role = name

    # The network

    def forward(self, x_t: Tensor, t: Tensor, condition: AnyCondition) -> Tensor:
        """The active role's output, (B, 4, H/8, W/8) like `x_t`; t: (B,) timesteps."""
        inputs = self._inputs(x_t, t, condition)
        with self._autocast(x_t):
            output: Tensor = self.passes_of(self._role)(*inputs)
        return output.to(x_t.dtype)

    def features(
        self, x_t: Tensor, t: Tensor, condition: AnyCondition, layers: Sequence[str] = (MIDDLE,)
    ) -> tuple[Tensor, ...]:
        """The maps of these `layers` (B, C, h, w) in `x_t`'s dtype: half the network, no decoder.

        The middle block's of SDXL at 1024 px: 1280 channels at 32x32.
        """
        inputs = self._inputs(x_t, t, condition)
        with self._autocast(x_t):
            maps = self.passes_of(self._role).features(*inputs, layers)
        return tuple(found.to(x_t.dtype) for found in maps)

    def with_features(
        self, x_t: Tensor, t: Tensor, condition: AnyCondition, layers: Sequence[str] = (MIDDLE,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` and `features` give, in one pass."""
        inputs = self._inputs(x_t, t, condition)
        with self._autocast(x_t):
            output, maps = self.passes_of(self._role).with_features(*inputs, layers)
        return output.to(x_t.dtype), tuple(found.to(x_t.dtype) for found in maps)

    def _inputs(self, x_t: Tensor, t: Tensor, condition: AnyCondition) -> tuple[Any, ...]:
        passes = self.passes_of(self._role)
        sample, *told = passes.inputs(x_t, condition, self._autocast_dtype)
        return sample, t, *told

    @property
    def layers(self) -> dict[str, LayerShape]:
        """The maps that `features` can give, by name."""
        return self.passes_of(TEACHER).layers

    def _autocast(self, x_t: Tensor) -> AbstractContextManager[object]:
        """Without autocast's cache of cast weights: one made under no_grad (a rollout) would
        leave the student's own call without gradients (before torch 2.9 or so)."""
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(x_t.device.type, self._autocast_dtype, cache_enabled=False)

    def enable_gradient_checkpointing(self) -> None:
        """Trade a second forward for memory, block by block, always in the first one's role."""

        def recomputed(function: Callable[..., Any], *args: Any) -> Any:
            role = self._role  # of the forward, which is running now
            return checkpoint(
                function,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # SDXL has no dropout
                context_fn=lambda: (nullcontext(), self.role(role)),
            )

        for unet in (self.unet, *self.copies.values()):
            unet.enable_gradient_checkpointing(recomputed)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile each transformer block, in place: one region, compiled once for all alike.

        Roles and gradient modes are variants of their own, compiled when they are first met.
        """
        import torch._dynamo.config as dynamo
        from diffusers.models.attention import BasicTransformerBlock

        dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_COMPILED_VARIANTS)
        for unet in (self.unet, *self.copies.values()):
            for module in unet.modules():
                if isinstance(module, BasicTransformerBlock):
                    module.compile(backend=backend)

    # Weights

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The role's float32 parameters in the network's order: down and up of each module, or
        all weights of a copy."""
        if role in self.copies:
            return list(self.copies[role].parameters())
        return [weight for _, *pair in self.pairs_of(role) for weight in pair]

    def role_state_dict(self, role: str) -> dict[str, Tensor]:
        """ "MODULE.lora_A.weight" (down) and "MODULE.lora_B.weight" (up); no adapter names in it.

        Of a copy all its weights under their own names. The tensors share memory with the
        parameters: an average or a checkpoint clones them.
        """
        if role in self.copies:
            return self.copies[role].state_dict()
        state = {}
        for module, down, up in self.pairs_of(role):
            state[f"{module}.lora_A.weight"] = down.detach()
            state[f"{module}.lora_B.weight"] = up.detach()
        return state

    @torch.no_grad()
    def load_role_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copy `state` (of `role_state_dict`) into the role; ValueError unless it fits exactly."""
        own = self.role_state_dict(role)
        wrong = sorted(set(own) ^ set(state))
        wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} tensors do not fit the {role}'s weights, first {wrong[0]!r}: load "
                "weights of the same base model, rank and target modules"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def pairs_of(self, role: str) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """(diffusers' module name, down, up) of each adapted module, in the network's order."""
        return [
            (module, layer.lora_A[role].weight, layer.lora_B[role].weight)
            for module, layer in self._layers.items()
        ]


class RoleScope:
    """Context manager of `SharedUNet.role`; may be entered again (checkpoints recompute twice)."""

    def __init__(self, shared: SharedUNet, name: str) -> None:
        self._shared, self._name = shared, name
        self._previous: list[str] = []

    def __enter__(self) -> None:
        self._previous.append(self._shared.active_role)
        self._shared._activate(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shared._activate(self._previous.pop())
