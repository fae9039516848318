"""LatentLPIPS: LPIPS whose classifier, a VGG16 with batch normalisation, was trained on latents.

Source: Kang et al., arXiv 2405.05967. The files are those of github.com/mingukkang/elatentlpips
(CC BY-NC: not for commercial use); their names and places of layers are taken from how that project
reads them. Its "E-" form, random augmentations of both latents, is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .lpips import Lpips, cut
from .weights import fill, read_weights

# Convolutions of each stage, by their places in torchvision's vgg16_bn.
CONVOLUTIONS = ((0, 3), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40))
STAGE_ENDS = (7, 14, 24, 34, 44)
POOLS = (33, 43)
"""Places of the poolings that are left: a latent is small, so the first three are taken out."""


def load_latent_lpips(path: Path, option: str, source: str) -> Lpips:
    """The distance of scaled latents (B, C, h, w); C and all widths are the file's.

    ValueError for a file that is missing, damaged, or of another network; `source` is where to
    get it.
    """
    found = read_weights(path, option, source)
    weights = {_layer(name): tensor for name, tensor in found.items() if name.startswith("net.")}
    channels = [found.get(f"lin{number}.model.1.weight") for number in range(len(STAGE_ENDS))]
    first = weights.get("0.weight")
    if first is None or first.ndim != 4 or any(tensor is None for tensor in channels):
        raise ValueError(
            f"{option} {str(path)!r} is no file of elatentlpips, which has net.slice1.0.weight and "
            f"lin0.model.1.weight to lin4; get it from {source}."
        )
    with torch.device("meta"):  # no random weights, they come from the file
        layers = _layers(weights, path, option, source)
    fill(layers, weights, path, option)
    stages = cut(layers, STAGE_ENDS)
    rows = [tensor.float().flatten() for tensor in channels if tensor is not None]
    for stage, row in zip(stages, rows, strict=True):
        width = next(m.num_features for m in reversed(stage) if isinstance(m, nn.BatchNorm2d))
        if len(row) != width:
            raise ValueError(
                f"{option} {str(path)!r} weighs {len(row)} channels where its network has {width}; "
                f"get it from {source}."
            )
    blank = [0.0] * first.shape[1]
    network = Lpips(stages, rows, shift=blank, scale=[1.0] * first.shape[1])
    return network.eval().requires_grad_(False)


def _layer(name: str) -> str:
    """net.slice2.7.weight -> 7.weight."""
    return name.split(".", 2)[2]


def _layers(weights: dict[str, Tensor], path: Path, option: str, source: str) -> nn.Sequential:
    """torchvision's order: convolution, normalisation, ReLU; nothing where a pooling was."""
    layers: list[nn.Module] = [nn.Identity() for _ in range(STAGE_ENDS[-1])]
    for place in (place for stage in CONVOLUTIONS for place in stage):
        weight = weights.get(f"{place}.weight")
        if weight is None or weight.ndim != 4:
            raise ValueError(
                f"{option} {str(path)!r} lacks layer {place} of a VGG16; get it from {source}."
            )
        width, inputs = weight.shape[:2]
        layers[place] = nn.Conv2d(inputs, width, 3, padding=1)
        layers[place + 1] = nn.BatchNorm2d(width)
        layers[place + 2] = nn.ReLU()
    for place in POOLS:
        layers[place] = nn.MaxPool2d(2)
    return nn.Sequential(*layers)
