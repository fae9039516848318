"""State dicts of diffusers' and transformers' networks <-> tensors of a single file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .names import (
    CLIP_G_PREFIX,
    CLIP_L_PREFIX,
    SD15_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_g_names,
    renamed,
    unet_names,
    vae_names,
)

if TYPE_CHECKING:
    from .components import Components

State = dict[str, Tensor]

_TEXT = "text_model."
"""transformers 5 has it before encoder G's names only, transformers 4 before both encoders'."""
_VAE_ATTENTION = ".mid_block.attentions."
_FUSED = ("q_proj", "k_proj", "v_proj")
"""The three projections that open_clip stores as one, in this order."""


def base_state_dict(unet: nn.Module) -> State:
    """The UNet's own weights under their own names, also when it carries adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }


# To the file


def unet_to_file(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """LDM names without the file's prefix, as `fingerprint.weights_hash` takes them."""
    names = unet_names(config)
    return {renamed(name, names): tensor for name, tensor in state.items()}


def components_to_file(components: Components) -> State:
    """All tensors of the single file, in the networks' own dtypes."""
    unet = unet_to_file(base_state_dict(components.unet), components.unet.config)
    parts = {
        UNET_PREFIX: unet,
        VAE_PREFIX: _vae_to_file(components.vae.state_dict(), components.vae.config),
    }
    encoder_l = {
        name.removeprefix(_TEXT): tensor
        for name, tensor in components.text_encoders[0].state_dict().items()
    }
    if components.kind == "sd15":
        parts[SD15_CLIP_PREFIX] = encoder_l
    else:
        encoder_g = components.text_encoders[1]
        num_layers = encoder_g.config.num_hidden_layers
        parts[CLIP_L_PREFIX] = encoder_l
        parts[CLIP_G_PREFIX] = _clip_g_to_file(encoder_g.state_dict(), num_layers)
    return {
        prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()
    }


def _vae_to_file(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """Attention's linear layers become 1x1 convolutions."""
    names, file = vae_names(config), {}
    for name, tensor in state.items():
        linear = _VAE_ATTENTION in name and tensor.ndim == 2
        file[renamed(name, names)] = tensor[:, :, None, None] if linear else tensor
    return file


def _clip_g_to_file(state: Mapping[str, Tensor], num_layers: int) -> State:
    """Query, key and value in one tensor, and the projection transposed (x @ projection)."""
    names, file = clip_g_names(num_layers), {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix(_TEXT)
        if name == "text_projection.weight":
            file["text_projection"] = tensor.T
        elif not any(part in name for part in _FUSED):
            file[renamed(name, names)] = tensor
        elif _FUSED[0] in name:
            parts = [state[full_name.replace(_FUSED[0], part)] for part in _FUSED]
            file[_fused_name(name)] = torch.cat(parts)
    return file


def _fused_name(name: str) -> str:
    """encoder.layers.3.self_attn.q_proj.bias -> transformer.resblocks.3.attn.in_proj_bias"""
    words = name.split(".")
    return f"transformer.resblocks.{words[2]}.attn.in_proj_{words[-1]}"


# From the file. `keys` are the names in the network's state dict.


def unet_from_file(file: State, keys: Iterable[str], config: Mapping[str, Any]) -> State:
    names = unet_names(config)
    state = _pick(file, keys, lambda key: UNET_PREFIX + renamed(key, names))
    num = sum(name.startswith(UNET_PREFIX) for name in file)
    if num != len(state):
        raise ValueError(f"its UNet has {num - len(state)} tensors more than the structure")
    return state


def vae_from_file(file: State, keys: Iterable[str], config: Mapping[str, Any]) -> State:
    names = vae_names(config)
    state = _pick(file, keys, lambda key: VAE_PREFIX + renamed(key, names))
    return {
        key: tensor[:, :, 0, 0] if _VAE_ATTENTION in key and tensor.ndim == 4 else tensor
        for key, tensor in state.items()
    }


def clip_l_from_file(file: State, keys: Iterable[str], prefix: str = CLIP_L_PREFIX) -> State:
    return _pick(file, keys, lambda key: prefix + key.removeprefix(_TEXT))


def clip_g_from_file(file: State, keys: Iterable[str], num_layers: int) -> State:
    names = clip_g_names(num_layers) | {"text_projection.weight": "text_projection"}

    def file_name(key: str) -> str:
        name = key.removeprefix(_TEXT)
        fused = any(part in name for part in _FUSED)
        return CLIP_G_PREFIX + (_fused_name(name) if fused else renamed(name, names))

    state = _pick(file, keys, file_name)
    for key, tensor in state.items():
        if key == "text_projection.weight":
            state[key] = tensor.T
        for index, part in enumerate(_FUSED):
            if part in key:
                state[key] = tensor.chunk(3)[index]
    return state


def _pick(file: State, keys: Iterable[str], file_name: Callable[[str], str]) -> State:
    wanted = {key: file_name(key) for key in keys}
    missing = [name for name in wanted.values() if name not in file]
    if missing:
        raise ValueError(f"{len(missing)} of its tensors are missing, first {missing[0]}")
    return {key: file[name] for key, name in wanted.items()}
