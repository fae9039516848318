"""One frozen UNet in several roles: adapters off is the teacher, each adapter is another network.

The order of work in a training step should need no switch between a forward and its backward
(`dmd2_core.losses.sample_gradient`); under gradient checkpointing the recomputation re-activates
the role of its forward all the same, because the wrong one would go unnoticed.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .text import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TEACHER, STUDENT, CRITIC = "teacher", "student", "critic"
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""Ends of the names of the modules that get an adapter: 788 modules in SDXL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Size of one adapter: out += (alpha / rank) * up(down(x))."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}: use 1 or more, such as 64")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha is {self.alpha}: use a positive number, such as 8")


class SharedUNet(nn.Module):
    """A frozen base UNet with one float32 adapter per role; outside `role` it is the teacher.

    `requires_grad` is set here once (base off, every adapter on) and never touched again: flags
    select kernels and so the last bits of a result. The base may be of any dtype; inputs are cast
    to it and outputs to the dtype of `x_t`. Move it with `.to(device)`, never to another dtype.
    """

    def __init__(
        self, unet: UNet2DConditionModel, adapters: Mapping[str, LoraSpec], *, seed: int
    ) -> None:
        """`adapters`: role name -> size; "down" drawn from (seed, role, module), "up" zero."""
        super().__init__()
        assert TEACHER not in adapters
        assert not getattr(unet, "peft_config", None), "a UNet is shared once"
        self.unet = unet.requires_grad_(False)
        self.adapters = dict(adapters)
        self._base_dtype = unet.conv_in.weight.dtype
        with torch.random.fork_rng(devices=[]):  # peft draws weights of its own first
            for role, spec in adapters.items():
                _add_adapter(unet, role, spec)
        self._layers = dict(_lora_layers(unet))
        for role in adapters:
            for module, down, up in self.pairs_of(role):
                _initialise(down, up, f"{seed}/{role}/{module}")
        self._role = ""
        self._activate(TEACHER)

    # Roles

    @property
    def active_role(self) -> str:
        return self._role

    @property
    def modules_with_adapter(self) -> list[str]:
        """diffusers' names of the adapted modules, in the order of the network."""
        return list(self._layers)

    def role(self, name: str) -> RoleScope:
        """`with unet.role("student"): ...`; restores the role before it, and nests."""
        if name != TEACHER and name not in self.adapters:
            known = ", ".join([TEACHER, *self.adapters])
            raise ValueError(f"role {name!r} is unknown: use one of {known}")
        return RoleScope(self, name)

    def _activate(self, name: str) -> None:
        if name == self._role:
            return
        # peft's set_adapter and enable_adapters would also set requires_grad, 20 times slower.
        settings = {"_active_adapter": [name], "_disable_adapters": name == TEACHER}
        if name == TEACHER:
            del settings["_active_adapter"]
        for layer in self._layers.values():
            layer.__dict__.update(settings)
        self._role = name

    # The network

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The active role's output, (B, 4, H/8, W/8) like `x_t`; t: (B,) timesteps."""
        hidden, added = self._inputs(condition)
        output = self.unet(
            x_t.to(self._base_dtype),
            t,
            encoder_hidden_states=hidden,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The middle block's output (B, C, h, w) in `x_t`'s dtype: half the network, no decoder.

        SDXL at 1024 px: 1280 channels at 32x32.
        """
        unet, sample = self.unet, x_t.to(self._base_dtype)
        hidden, added = self._inputs(condition)
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        embedding = embedding + unet.get_aug_embed(
            emb=embedding, encoder_hidden_states=hidden, added_cond_kwargs=added
        )
        sample = unet.conv_in(sample)
        for block in (*unet.down_blocks, unet.mid_block):
            attends = getattr(block, "has_cross_attention", False)
            context = {"encoder_hidden_states": hidden} if attends else {}
            output = block(hidden_states=sample, temb=embedding, **context)
            sample = output if isinstance(output, Tensor) else output[0]
        return sample.to(x_t.dtype)

    @property
    def feature_channels(self) -> int:
        return int(self.unet.config.block_out_channels[-1])

    def _inputs(self, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states, and the pooled vector with the size ids (those stay float32)."""
        pooled = condition.pooled.to(self._base_dtype)
        added = {"text_embeds": pooled, "time_ids": condition.time_ids}
        return condition.hidden.to(self._base_dtype), added

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

        self.unet.enable_gradient_checkpointing(recomputed)

    # Weights

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The role's float32 parameters, down and up of each module in the network's order."""
        return [weight for _, *pair in self.pairs_of(role) for weight in pair]

    def role_state_dict(self, role: str) -> dict[str, Tensor]:
        """ "MODULE.lora_A.weight" (down) and "MODULE.lora_B.weight" (up); no adapter names in it.

        The tensors share memory with the parameters: an average or a checkpoint clones them.
        """
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
                f"{len(wrong)} tensors do not fit the {role}'s adapter, first {wrong[0]!r}: load "
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


def _add_adapter(unet: UNet2DConditionModel, role: str, spec: LoraSpec) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(TARGETS))
    with warnings.catch_warnings():  # the second adapter is meant
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(config, adapter_name=role)


def _lora_layers(unet: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)]


@torch.no_grad()
def _initialise(down: nn.Parameter, up: nn.Parameter, key: str) -> None:
    """Kaiming-uniform "down" and zero "up", float32, the same on every device and in any order."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    values = torch.empty(down.shape)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    down.data = values.to(down.device)
    up.data = torch.zeros(up.shape, device=up.device)
    for weight in (down, up):
        weight.requires_grad_(True)
