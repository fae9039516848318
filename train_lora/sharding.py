"""Full weights over several processes: each keeps a part of every copy (FSDP2).

Weights, gradients, optimizer states and the average of a copy exist once over all processes, cut
along the first dimension; a block's weights are gathered when a pass reaches it. What is small
(adapters, the discriminator's head) stays whole everywhere (`distributed.py`). Files hold whole
tensors, so that any number of processes goes on from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import reaching_the_others, several

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from .config import Config
    from .models.roles import SharedUNet


def check_sharding(config: Config) -> None:
    """ValueError for settings that do not go together with sharded weights."""
    full = [s for s in ("student", "critic") if getattr(config, s).kind == "full"]
    if not several() or not full:
        return
    what = f'{full[0]}.kind is "full" and there are {dist.get_world_size()} processes'
    if config.training.optimizer == "adamw8bit":
        raise ValueError(
            f'training.optimizer is "adamw8bit", but {what}, whose 8-bit states cannot be put '
            'together in a checkpoint; set it to "adamw" (each process holds only a part of the '
            f'states), or {full[0]}.kind to "lora".'
        )
    if config.training.compile:
        raise ValueError(
            f"training.compile is true, but {what}, whose blocks are gathered as they are reached, "
            f'which was never tried compiled; set it to false, or {full[0]}.kind to "lora".'
        )


def shard_copies(unet: SharedUNet, device: torch.device) -> None:
    """Leave this process its part of each full copy, on `device`; nothing for one process.

    Before anything keeps a parameter: they are replaced. Every process holds the same weights.
    """
    if not several() or not unet.copies:
        return
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from .models.edm_unet import ResidualBlock

    kinds = BasicTransformerBlock | ResnetBlock2D | ResidualBlock
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for role in unet.copies:
        passes = unet.passes_of(role)
        blocks = [m for m in passes.modules() if isinstance(m, kinds)]
        for module in (*blocks, passes):
            # By default the outermost module keeps its weights gathered after a pass without
            # gradients, and would go on with them after an update.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for name in passes.METHODS:
            register_fsdp_forward_method(passes, name)
    unet.needs_all_processes = True


def is_sharded(tensor: Tensor) -> bool:
    if not several():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to `max_norm` together; returns their norm before, 0-dimensional.

    The norm is that of the whole gradient, the shards of all processes included.
    """
    given = [p.grad for p in parameters if p.grad is not None]
    shards = [local(grad) for grad in given if is_sharded(grad)]
    norm = nn.utils.get_total_norm([grad for grad in given if not is_sharded(grad)])
    if shards:
        squared = nn.utils.get_total_norm(shards).square()
        with reaching_the_others():
            dist.all_reduce(squared)
        norm = (norm.to(squared.device).square() + squared).sqrt()
    if given:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in given], factor)
    return norm


# -- whole tensors ---------------------------------------------------------------------------------


def to_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the main process (the sharded ones on the CPU), nothing in the others.

    Where any is sharded, all processes must call it with the same names in the same order.
    """
    is_main = not several() or dist.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            with reaching_the_others():
                tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
            tensor = tensor.cpu() if is_main else tensor
        if is_main:
            found[name] = tensor
    return found


@torch.no_grad()
def place_whole(value: Tensor, into: Tensor) -> None:
    """Copy `value`, whole in every process, into a tensor of its shape that may be sharded."""
    if not is_sharded(into):
        into.copy_(value)
        return
    own = local(into.detach())
    parts = value.chunk(dist.get_world_size())  # as FSDP2 cuts; the last may be empty
    if dist.get_rank() < len(parts):
        own.copy_(parts[dist.get_rank()])


def shards_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` (a state of this parameter) cut as the parameter is; a number is left alone."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    shards = torch.zeros_like(parameter.detach(), dtype=value.dtype)
    place_whole(value, shards)
    return shards


def whole_network(network: UNet2DConditionModel) -> UNet2DConditionModel | None:
    """The network with all its weights: itself, or, of a sharded one, a copy on the CPU in the main
    process and None in the others. All processes must call it."""
    if not any(is_sharded(weight) for weight in network.parameters()):
        return network
    state = to_main(network.state_dict())
    if not state:
        return None
    from accelerate import init_empty_weights

    with init_empty_weights():
        whole = type(network).from_config(copy.deepcopy(network.config))
    whole.load_state_dict(state, assign=True)
    return whole  # type: ignore[no-any-return]
