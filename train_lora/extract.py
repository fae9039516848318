"""A LoRA from full weights: the best low-rank approximation of what training has changed.

W_student - W_base of each module, cut to its `rank` largest singular values (Eckart-Young); what
has no place in a LoRA (biases, norms, the first and last convolution) is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora_files import LoraModule
from .models.adapters import is_target

OVERSAMPLING, POWER_ITERATIONS = 16, 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extraction:
    """An extracted LoRA and how much of the change it holds."""

    modules: dict[str, LoraModule]
    """By diffusers' names; alpha is the rank."""
    kept: float
    """Share of the summed squared change of all weights that the LoRA reproduces, 0 to 1."""


@torch.no_grad()
def extract_lora(
    student: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int
) -> Extraction:
    """`student`, `base`: state dicts of the same UNet (diffusers' names), any float dtype.

    Modules smaller than `rank` get as much as they can hold.
    """
    assert student.keys() == base.keys(), "the same network"
    modules: dict[str, LoraModule] = {}
    total = missed = 0.0
    for name, weight in student.items():
        change = (weight.float() - base[name].to(weight.device).float()).cpu()
        total += float(change.double().square().sum())
        module = name.removesuffix(".weight")
        if not is_target(module) or change.ndim < 2:
            missed += float(change.double().square().sum())
            continue
        down, up = low_rank(change.flatten(1), rank)
        missed += float((change.flatten(1) - up @ down).double().square().sum())
        kernel = change.shape[2:]
        modules[module] = LoraModule(
            down=down.reshape(-1, *change.shape[1:]),
            up=up.reshape(*up.shape, *(1,) * len(kernel)),
            alpha=float(len(down)),
        )
    return Extraction(modules=modules, kept=1 - missed / total if total else 1.0)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rank, in) and (out, rank), whose product is the closest to `matrix` (out, in) of that rank.

    Singular values are shared by both. Where the rank is small against the matrix a randomised
    decomposition (with a fixed seed) is accurate and many times faster.
    """
    rank = min(rank, *matrix.shape)
    if 4 * (rank + OVERSAMPLING) < min(matrix.shape):
        u, s, v = _randomised_svd(matrix, rank)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


def _randomised_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp 2011, with power iterations; reproducible."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator)
    basis, _ = torch.linalg.qr(matrix @ start.to(matrix))
    for _ in range(POWER_ITERATIONS):
        other, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh.T
