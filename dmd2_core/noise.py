"""Reproducible noise: image i of a batch gets the same noise whatever the batch and the device.

Every image and step has a generator of its own, seeded by a hash of (seed, image, step), and draws
on the CPU. Only another processor kind may change the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INITIAL_STEP = -1
"""The step index under which the noise that a sample starts from is drawn."""

_MASK = (1 << 64) - 1


def _splitmix64(value: int) -> int:
    """One output of the splitmix64 generator: a 64-bit mixing of `value` (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from integers, such as (seed, image, step): stable across runs and machines.

    Order counts; negative integers are taken modulo 2^64. (torch's CPU generator uses the low 32
    bits, so among very many draws two may coincide by chance.)
    """
    state = 0
    for part in parts:
        state = _splitmix64(state ^ _splitmix64(part & _MASK))
    return state


def derived_generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded with `derived_seed(*parts)`."""
    return torch.Generator("cpu").manual_seed(derived_seed(*parts))


@dataclass(frozen=True, slots=True)
class SeededNoise:
    """The noise source of `few_step_sample`: `SeededNoise(seed)(step, like)`."""

    seed: int
    first_index: int = 0
    """Index of the batch's first image among all (rank * batch, or the images done so far)."""

    def __call__(self, step: int, like: Tensor) -> Tensor:
        """Unit Gaussian noise with `like`'s shape (B, ...), dtype and device.

        Drawn in float32 on the CPU; row i depends on (seed, first_index + i, step) and the row's
        shape only.
        """
        return self.draw(step, like.shape).to(like.device, like.dtype)

    def draw(self, step: int, shape: Sequence[int]) -> Tensor:
        """As `__call__` for a `shape` (B, ...): float32 on the CPU."""
        if len(shape) == 0 or shape[0] == 0:
            raise ValueError(f"shape is {tuple(shape)}: give (B, ...) with at least one image")
        rows = [
            torch.randn(
                tuple(shape[1:]),
                generator=derived_generator(self.seed, self.first_index + row, step),
                dtype=torch.float32,
            )
            for row in range(shape[0])
        ]
        return torch.stack(rows)


def initial_noise(shape: Sequence[int], seed: int, *, first_index: int = 0) -> Tensor:
    """The noise samples start from: `shape` (B, C, H, W), float32 on the CPU.

    The same as `SeededNoise(seed, first_index)(INITIAL_STEP, like)`.
    """
    return SeededNoise(seed, first_index).draw(INITIAL_STEP, shape)
