"""LPIPS: how different two pictures look, by the features of a classifier.

Source: Zhang et al., arXiv 1801.03924, version 0.1 of its weights. AlexNet is what figures are
reported with, VGG16 what losses use. Checked against torchmetrics' in tests/train.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .weights import fill, read_weights

SOURCE = (
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth "
    "(or vgg16-397923af.pth there, for the VGG form)"
)
# Layers of torchvision's `features` after which the activations are looked at.
STAGE_ENDS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
FIRST_KERNEL = {11: "alex", 3: "vgg"}
# ImageNet's mean and deviation for pictures in [-1, 1], as the published weights expect them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The distance, differentiable in both pictures; its own weights are frozen."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channel_weights: Sequence[Tensor],
        *,
        shift: Sequence[float] = SHIFT,
        scale: Sequence[float] = SCALE,
    ) -> None:
        """`stages`: parts of a classifier in their order; `channel_weights`: of each stage's
        channels; `shift`, `scale`: of each channel of what it looks at."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        for number, weights in enumerate(channel_weights):
            self.register_buffer(f"channel_weights_{number}", weights.view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1))

    def activations(self, images: Tensor) -> list[Tensor]:
        """Of each stage, scaled to length 1 at each place. images: (B, 3, H, W) in [-1, 1]."""
        x = (images.float() - self.shift) / self.scale
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def between(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """The distances (B,) of pictures whose `activations` are known."""
        distance = torch.zeros(len(first[0]), device=first[0].device)
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            weights: Tensor = getattr(self, f"channel_weights_{number}")
            distance = distance + (weights * (a - b).square()).sum(1).mean((1, 2))
        return distance

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,) float32 of pictures (B, 3, H, W) in [-1, 1]."""
        return self.between(self.activations(first), self.activations(second))

    @torch.no_grad()
    def diversity(self, images: Tensor) -> float:
        """Mean distance of all pairs of S >= 2 pictures (S, 3, H, W) of one prompt."""
        seen = [self.activations(image[None]) for image in images]
        distances = [
            self.between(seen[i], seen[j])
            for i in range(len(seen))
            for j in range(i + 1, len(seen))
        ]
        return float(torch.cat(distances).mean())


def load_lpips(path: Path, option: str = "--lpips", source: str = SOURCE) -> Lpips:
    """LPIPS on the classifier in `path`: torchvision's AlexNet or VGG16, told apart by its sizes.

    The weights of the channels (a few KB, BSD licence) come with torchmetrics.
    """
    import torchvision

    backbone = read_weights(path, option, source)
    first = backbone.get("features.0.weight")
    kind = FIRST_KERNEL.get(first.shape[-1]) if first is not None and first.ndim == 4 else None
    if kind is None:
        raise ValueError(
            f"{option} {str(path)!r} is neither torchvision's AlexNet nor its VGG16; get {source}."
        )
    with torch.device("meta"):  # no random weights, they come from the file
        model = torchvision.models.alexnet() if kind == "alex" else torchvision.models.vgg16()
    for layer in model.features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # else activations of a stage are overwritten by the next
    prefix = "features."
    weights = {n.removeprefix(prefix): w for n, w in backbone.items() if n.startswith(prefix)}
    fill(model.features, weights, path, option)
    stages = cut(model.features, STAGE_ENDS[kind])
    return Lpips(stages, _channel_weights(kind)).eval().requires_grad_(False)


def cut(layers: nn.Sequential, ends: Sequence[int]) -> list[nn.Sequential]:
    """The layers up to each of `ends`, from the one before it."""
    begins = (0, *ends[:-1])
    return [layers[begin:end] for begin, end in zip(begins, ends, strict=True)]


def _channel_weights(kind: str) -> list[Tensor]:
    found = find_spec("torchmetrics")  # not imported: that takes seconds
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")
    file = Path(found.origin).parent / "functional" / "image" / "lpips_models" / f"{kind}.pth"
    weights = read_weights(file, "torchmetrics' LPIPS weights", "the torchmetrics package")
    return [weights[f"lin{number}.model.1.weight"].float() for number in range(5)]
