"""The sampler: a pure function of seed and position, one bucket a step, every image its turn."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from train_lora.data.order import BLOCK_STEPS, SampleOrder, shuffled_indices

ORDER = SampleOrder(num_prompts=11, bucket_weights=(9, 30, 4), has_images=True, samples_per_step=4)


def step_rows(order: SampleOrder, step: int, seed: int = 5):
    return order.rows(step * order.samples_per_step, order.samples_per_step, seed)


def test_any_split_over_ranks_and_micro_batches_reads_the_same_samples() -> None:
    for step in (0, 1, 7, 100, BLOCK_STEPS + 3):
        whole = step_rows(ORDER, step)
        for size in (1, 2):
            parts = [ORDER.rows(step * 4 + first, size, 5) for first in range(0, 4, size)]
            assert {part.bucket for part in parts} == {whole.bucket}
            assert torch.equal(torch.cat([part.prompts for part in parts]), whole.prompts)
            assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_a_step_does_not_depend_on_the_steps_asked_for_before() -> None:
    later = step_rows(ORDER, 2000)
    for step in range(30):
        step_rows(ORDER, step)
    again = step_rows(ORDER, 2000)
    assert later.bucket == again.bucket
    assert torch.equal(later.images, again.images)
    assert torch.equal(later.prompts, again.prompts)


def test_within_a_bucket_every_image_is_seen_once_a_pass() -> None:
    """Across the border of two blocks as well, where the visits are counted anew."""
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(BLOCK_STEPS + 50):
        rows = step_rows(ORDER, step)
        seen[rows.bucket] += rows.images.tolist()
    for bucket, count in enumerate(ORDER.bucket_weights):
        whole = len(seen[bucket]) // count * count
        assert whole > 0
        for first in range(0, whole, count):
            assert sorted(seen[bucket][first : first + count]) == list(range(count))


def test_buckets_come_in_proportion_to_their_images() -> None:
    buckets = Counter(ORDER.bucket_at(step, seed=1)[0] for step in range(4000))
    for bucket, count in enumerate(ORDER.bucket_weights):
        # A binomial share of 4000 draws: four standard deviations are below 0.032.
        assert buckets[bucket] / 4000 == pytest.approx(count / 43, abs=0.032)


def test_seeds_give_other_orders() -> None:
    bucket_runs = [[ORDER.bucket_at(step, seed)[0] for step in range(40)] for seed in (1, 2)]
    assert bucket_runs[0] != bucket_runs[1]
    assert step_rows(ORDER, 0, 1).prompts.tolist() != step_rows(ORDER, 0, 2).prompts.tolist()


def test_one_bucket_is_the_plain_shuffled_order() -> None:
    order = SampleOrder(num_prompts=6, bucket_weights=(7,), has_images=True, samples_per_step=3)
    images = torch.cat([step_rows(order, step).images for step in range(7)])
    passes = images.view(3, 7)
    assert all(sorted(row.tolist()) == list(range(7)) for row in passes)
    prompts = torch.cat([step_rows(order, step).prompts for step in range(4)])
    assert sorted(prompts[:6].tolist()) == list(range(6))


def test_without_images_the_sizes_are_drawn_and_prompts_follow_their_order() -> None:
    order = SampleOrder(num_prompts=5, bucket_weights=(1, 1), has_images=False, samples_per_step=2)
    rows = [step_rows(order, step) for step in range(50)]
    assert {row.bucket for row in rows} == {0, 1}
    assert all(row.images is None for row in rows)


def test_the_permutations_are_not_shared_state() -> None:
    first = shuffled_indices(5, 0, 5, seed=3)
    kept = first.clone()
    first += 100
    assert torch.equal(shuffled_indices(5, 0, 5, seed=3), kept)
