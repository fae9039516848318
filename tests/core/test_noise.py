"""Seeded noise: independent of batch size, place and device, and Gaussian."""

import pytest
import torch

from dmd2_core import INITIAL_STEP, SeededNoise, derived_seed, initial_noise
from dmd2_core.noise import _splitmix64

SHAPE = (4, 4, 16, 16)


def test_hash_is_splitmix64() -> None:
    # First and second output of the published generator started at 0.
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    assert _splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_seeds_are_distinct_and_ordered() -> None:
    seeds = {
        derived_seed(seed, index, step) & 0xFFFFFFFF  # what torch's CPU generator keeps
        for seed in range(20)
        for index in range(20)
        for step in range(-1, 8)
    }
    # 3600 random 32-bit numbers coincide with probability 0.0015.
    assert len(seeds) == 20 * 20 * 9
    assert derived_seed(1, 2) != derived_seed(2, 1)
    assert 0 <= derived_seed(-1, -5, 1 << 70) < 1 << 64


def test_row_does_not_depend_on_the_batch() -> None:
    whole = SeededNoise(3)(2, torch.empty(SHAPE))
    for first in range(4):
        row = SeededNoise(3, first_index=first)(2, torch.empty(1, *SHAPE[1:]))
        assert torch.equal(row, whole[first : first + 1])


def test_seed_image_and_step_all_matter() -> None:
    draws = [
        SeededNoise(seed, index).draw(step, (1, 4, 16, 16))
        for seed, index, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, INITIAL_STEP)]
    ]
    table = torch.corrcoef(torch.stack(draws).flatten(1))
    # Correlation of 1024 independent values: standard deviation 1 / 32; five of them.
    assert (table - torch.eye(5)).abs().max() < 5 / 32


def test_noise_is_standard_normal() -> None:
    noise = SeededNoise(0).draw(1, (64, 4, 32, 32))
    # 2^18 values: the mean has standard error 1 / 512, the variance sqrt(2) / 512; five of them.
    assert abs(noise.mean().item()) < 5 / 512
    assert abs(noise.var().item() - 1) < 5 * 2**0.5 / 512


def test_noise_has_the_dtype_asked_for_and_the_same_values() -> None:
    wide = SeededNoise(5)(0, torch.empty(SHAPE))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        narrow = SeededNoise(5)(0, torch.empty(SHAPE, dtype=dtype))
        assert narrow.dtype == dtype
        assert torch.equal(narrow, wide.to(dtype))


def test_initial_noise_is_the_draw_before_the_first_step() -> None:
    expected = SeededNoise(9, 2)(INITIAL_STEP, torch.empty(SHAPE))
    assert torch.equal(initial_noise(SHAPE, 9, first_index=2), expected)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    initial_noise(SHAPE, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_shape_is_refused() -> None:
    for shape in ((), (0, 4, 8, 8)):
        with pytest.raises(ValueError, match="at least one image"):
            initial_noise(shape, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_the_gpu() -> None:
    like = torch.empty(SHAPE, device="cuda")
    assert torch.equal(SeededNoise(3)(2, like).cpu(), SeededNoise(3)(2, like.cpu()))
