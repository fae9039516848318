"""The loop around the two steps: rhythm of updates, determinism, stops, the averaged student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train_lora.average import WeightAverage
from train_lora.data.order import shuffled_indices

from .tiny import small_trainer, weights


def test_student_moves_every_nth_iteration_and_the_critic_in_each(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path / "run", critic__updates_per_generator=3, critic__warmup_iterations=1
    )
    moved = []
    for iteration in range(5):
        before = weights(trainer, "student"), weights(trainer, "critic")
        trainer.iterate(iteration)
        after = weights(trainer, "student"), weights(trainer, "critic")
        moved.append(tuple(not torch.equal(b, a) for b, a in zip(before, after, strict=True)))
    assert [student for student, _ in moved] == [False, True, False, False, True]
    assert all(critic for _, critic in moved)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    results = []
    for run, seed in enumerate((7, 7, 8)):
        trainer = small_trainer(tmp_path / str(run), training__seed=seed)
        for iteration in range(2):
            trainer.iterate(iteration)
        results.append((weights(trainer, "student"), weights(trainer, "critic")))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_average_follows_the_recursion_and_gives_the_weights_back() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    average = WeightAverage([parameter], decay=0.5)
    expected = 0.0
    for value in (1.0, 4.0, -2.0, 8.0, 3.0, 5.0):
        parameter.data.fill_(value)
        average.update()
        n = average.num_updates
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert parameter.item() == pytest.approx(expected, rel=1e-6)
    assert parameter.item() == 5.0


def test_every_pass_shows_each_sample_once_in_an_order_of_its_own() -> None:
    order = shuffled_indices(7, 0, 21, seed=1)
    passes = order.view(3, 7)
    assert all(sorted(row.tolist()) == list(range(7)) for row in passes)
    assert passes[0].tolist() != passes[1].tolist()
    assert torch.equal(shuffled_indices(7, 5, 6, seed=1), order[5:11])


def test_learning_rates_fall_in_a_straight_line_over_the_last_share(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path / "run",
        training__iterations=8,
        training__learning_rate_decay=0.5,
        student__learning_rate=1e-3,
        gan__learning_rate=2e-3,
        critic__updates_per_generator=1,
    )
    student, head = [], []
    for iteration in range(8):
        trainer.iterate(iteration)
        student.append(trainer.student.optimizer.param_groups[0]["lr"])
        head.append(trainer.critic.optimizer.param_groups[1]["lr"])
    falling = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert student == pytest.approx([1e-3 * share for share in falling])
    assert head == pytest.approx([2e-3 * share for share in falling])
