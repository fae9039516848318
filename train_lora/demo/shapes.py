"""Signed distances (negative inside) of the shapes that scenes show, at radius 1 around (0, 0).

Coordinates follow the picture: x to the right, y downwards. Exact distances where they are short,
otherwise a bound that is good near the outline, which is all that antialiasing needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - 0.92


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, one corner up: the intersection of three half planes."""
    slope = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y), y) - 0.55


def ring(x: Tensor, y: Tensor) -> Tensor:
    return ((x.square() + y.square()).sqrt() - 0.72).abs() - 0.24


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one tenth, then a half plane through tip and notch."""
    sector = 2 * math.pi / 5
    radius = (x.square() + y.square()).sqrt()
    angle = torch.atan2(x, -y)  # 0 points up
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    across, along = radius * folded.sin(), radius * folded.cos()
    notch_across, notch_along = 0.45 * math.sin(sector / 2), 0.45 * math.cos(sector / 2)
    edge_across, edge_along = (
        notch_across,
        notch_along - 1.05,
    )  # from the tip (0, 1.05) to the notch
    length = math.hypot(edge_across, edge_along)
    return (across * -edge_along + (along - 1.05) * edge_across) / length


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Two discs, and the part of a turned square between their tangents and the lower tip."""
    x, y = x.abs(), y + 0.1
    lobe = ((x - 0.42).square() + (y + 0.32).square()).sqrt() - 0.5
    sides = torch.maximum(x + y - 0.807, x - y - 0.74) / math.sqrt(2)
    return torch.minimum(lobe, torch.maximum(sides, -y - 0.32))


SHAPE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "ring": ring,
    "star": star,
    "heart": heart,
}
