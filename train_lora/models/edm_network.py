"""A class-conditional EDM denoiser over pixels, and its file (converted by `convert_edm`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Size, Tensor, nn

from dmd2_core import EDMSchedule, coefficients, edm_preconditioned, edm_scalings

from .edm_unet import EDMConfig, EDMUNet
from .safetensors_io import read_safetensors, write_safetensors

_HEAD_CHANNELS, _SIGMA_DATA = "edm.head_channels", "edm.sigma_data"
"""Metadata keys: the two settings that no shape tells."""
_FIRST = re.compile(r"model\.enc\.(\d+)x\1_conv\.weight")


class EDMNetwork(nn.Module):
    """D(x_t, sigma, class): a network that predicts "sample" on `EDMSchedule`.

    `network` of a `Denoiser`: Denoiser(EDMNetwork(config), EDMSchedule(), "sample").
    """

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = EDMUNet(config)

    def forward(self, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """`x_t`: (B, channels, side, side); `sigma`: (B,) noise levels; `labels`: (B,) int64, None
        for a network without classes -> x0 like `x_t`. Preconditioned in float64 around F."""
        self._check_labels(labels)
        denoise = edm_preconditioned(self.model, sigma_data=self.config.sigma_data)
        return denoise(x_t, sigma, labels)

    def features(self, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """What `forward` is given -> the middle block's map, the discriminator head's input:
        (B, config.feature_channels, config.feature_px, config.feature_px)."""
        self._check_labels(labels)
        _, wide = coefficients(EDMSchedule(), sigma, x_t)
        scale = edm_scalings(wide, self.config.sigma_data)
        noise = scale.noise.flatten().to(x_t.dtype)
        return self.model.features((scale.inner * x_t).to(x_t.dtype), noise, labels)

    def enable_gradient_checkpointing(self, recomputed: Callable[..., Tensor]) -> None:
        """`recomputed(block, *inputs)` runs each block where gradients are wanted."""
        self.model.recomputed = recomputed

    @classmethod
    def from_config(cls, config: EDMConfig) -> EDMNetwork:
        return cls(config)

    def _check_labels(self, labels: Tensor | None) -> None:
        if (labels is None) != (self.config.classes == 0):
            raise ValueError(
                f"the network has {self.config.classes} classes, but labels is "
                f"{'missing' if labels is None else 'given'}: pass one label per image exactly "
                "where the network has classes"
            )


def load_edm(path: str | Path) -> EDMNetwork:
    """The network of a file that `convert_edm` wrote, float32 on the CPU, frozen.

    ValueError if the file does not hold exactly such a network.
    """
    tensors, metadata = read_safetensors(path)
    try:
        config = infer_config({name: value.shape for name, value in tensors.items()}, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        network = EDMNetwork(config)
    network.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def save_edm(network: EDMNetwork, path: Path, metadata: Mapping[str, str]) -> None:
    """A file that `load_edm` reads, float32, with `metadata` beside its own. Replaces `path`."""
    tensors = {name: value.float() for name, value in network.state_dict().items()}
    write_safetensors(path, tensors, metadata_of(network.config) | metadata)


def metadata_of(config: EDMConfig) -> dict[str, str]:
    """What the file must say beside the weights."""
    return {_HEAD_CHANNELS: str(config.head_channels), _SIGMA_DATA: repr(config.sigma_data)}


def infer_config(shapes: Mapping[str, Size], metadata: Mapping[str, str]) -> EDMConfig:
    """The size of the network whose tensors have these names and shapes.

    ValueError, naming a tensor, if no network of this kind has exactly these.
    """
    first = next((match for match in map(_FIRST.fullmatch, sorted(shapes)) if match), None)
    if first is None or "model.map_layer0.weight" not in shapes:
        raise ValueError(
            "this is no EDM network: the tensors model.enc.64x64_conv.weight (or of another "
            "resolution) and model.map_layer0.weight are not there; convert a published EDM "
            "checkpoint of the ADM architecture with dmd2 convert-edm"
        )
    side, base = int(first[1]), _length(shapes, "model.map_layer0.weight", 1)
    factors, attention = [], []
    level_px = side
    while level_px:
        block = f"model.enc.{level_px}x{level_px}_block0"
        if f"{block}.conv0.weight" not in shapes:
            break
        factors.append(_length(shapes, f"{block}.conv0.weight", 0) // base)
        if f"{block}.qkv.weight" in shapes:
            attention.append(level_px)
        level_px //= 2
    blocks = 0
    while f"model.enc.{side}x{side}_block{blocks}.conv0.weight" in shapes:
        blocks += 1
    labels = "model.map_label.weight"
    config = EDMConfig(
        resolution_px=side,
        channels=_length(shapes, first[0], 1),
        classes=_length(shapes, labels, 1) if labels in shapes else 0,
        width=base,
        width_factors=tuple(factors),
        blocks=blocks,
        attention_px=tuple(attention),
        head_channels=int(metadata.get(_HEAD_CHANNELS, EDMConfig().head_channels)),
        sigma_data=float(metadata.get(_SIGMA_DATA, EDMConfig().sigma_data)),
    )
    _check_shapes(shapes, config)
    return config


def _length(shapes: Mapping[str, Size], name: str, axis: int) -> int:
    """How long the tensor is along `axis`, at least 1."""
    shape = shapes[name]
    if axis >= len(shape) or shape[axis] < 1:
        raise ValueError(
            f"the tensor {name} has shape {tuple(shape)}, which no EDM network has: "
            "the file is damaged"
        )
    return shape[axis]


def parameter_shapes(config: EDMConfig) -> dict[str, Size]:
    """Name -> shape of every tensor in the network's file."""
    with torch.device("meta"):
        return {name: t.shape for name, t in EDMNetwork(config).state_dict().items()}


def _check_shapes(shapes: Mapping[str, Size], config: EDMConfig) -> None:
    wanted = parameter_shapes(config)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            raise ValueError(f"the tensor {name} is missing: the file is incomplete")
        if name not in wanted:
            raise ValueError(
                f"the tensor {name} belongs to another architecture than ADM, the only one that "
                "is read: use edm-imagenet-64x64-cond-adm"
            )
        if shapes[name] != wanted[name]:
            raise ValueError(
                f"the tensor {name} has shape {tuple(shapes[name])}, not {tuple(wanted[name])}: "
                "the file is damaged, or is of another architecture than ADM"
            )
