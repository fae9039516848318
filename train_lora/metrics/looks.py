"""What pictures look like in a few numbers, and how far two systems' pictures are apart.

No learnt features, hence no download and no taste: they work for any model, and say whether a
student's pictures look like its teacher's, not whether they are beautiful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, cdist

from .diversity import diversity

LUMA = (0.299, 0.587, 0.114)
THUMBNAIL_CELLS = 16
"""Side of the thumbnails that variety and distance look at: composition and colour, no detail."""
FLOOR = 1e-3
"""Figures below it count as it, a quarter of the smallest step of an 8-bit picture: the ratio of
two nothings is 1."""


def looks(images: Tensor) -> dict[str, float]:
    """Means over pictures (N, 3, H, W) in [-1, 1], each on the scale where black is 0 and white 1.

    brightness: mean luma; contrast: its standard deviation within a picture; colour: largest less
    smallest channel of a pixel, 0 where it is gray; sharpness: root mean square of the luma's step
    from a pixel to its neighbours (gradient energy).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for image in images:  # one at a time: pictures of full size, many of them
        rgb = (image.float() + 1) / 2
        luma = (rgb * rgb.new_tensor(LUMA).view(3, 1, 1)).sum(0)
        across, down = luma.diff(dim=1)[1:], luma.diff(dim=0)[:, 1:]
        sums += torch.tensor(
            [
                float(luma.mean()),
                float(luma.std(correction=0)),
                float((rgb.amax(0) - rgb.amin(0)).mean()),
                float((across.square() + down.square()).mean().sqrt()),
            ]
        )
    names = ("brightness", "contrast", "colour", "sharpness")
    return dict(zip(names, (sums / len(images)).tolist(), strict=True))


def thumbnails(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as vectors (N, 768): 16x16 means of each channel.

    Scaled so that the distance of two is the root mean square of their difference, black to white
    being 1.
    """
    cells = [F.adaptive_avg_pool2d((i[None].float() + 1) / 2, THUMBNAIL_CELLS) for i in images]
    vectors = torch.cat(cells).flatten(1)
    return vectors / math.sqrt(vectors.shape[1])


def energy_distance(first: Tensor, second: Tensor) -> float:
    """How different two systems' pictures of the same prompts are: 0 where they are drawn alike.

    first, second: (P, S, D): P prompts, S >= 2 seeds. For each prompt 2 E|x - y| - E|x - x'| -
    E|y - y'|, averaged; it sees means and variety alike. Pairs of one seed are left out: the same
    noise may give them the same composition, which is no merit here. An unbiased estimate, so it
    can fall a little below 0. Source: Szekely and Rizzo 2013, "Energy statistics".
    """
    num_seeds = first.shape[1]
    apart = cdist(first.double(), second.double())
    of_one_seed = apart.diagonal(dim1=1, dim2=2).sum(1)
    across = (apart.sum((1, 2)) - of_one_seed).mean() / (num_seeds * (num_seeds - 1))
    return float(2 * across) - diversity(first) - diversity(second)


def ratio(student: float, teacher: float) -> float:
    """The student's figure to the teacher's, both at least `FLOOR`."""
    return max(student, FLOOR) / max(teacher, FLOOR)


def statistics_distance(ratios: Mapping[str, float]) -> float:
    """Root mean square of the logarithms: 0.1 is about 10% off in each figure, up or down."""
    logs = [math.log(value) for value in ratios.values()]
    return math.sqrt(sum(value * value for value in logs) / len(logs))
