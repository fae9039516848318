"""The loop around the two steps: rhythm of updates, determinism, stops, the averaged student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from train_lora.average import WeightAverage
from train_lora.data.order import shuffled_indices
from train_lora.data.training_data import TrainingData
from train_lora.distill import RealImages
from train_lora.trainer import Trainer, build_trainer

from .tiny import demo_config, random_components, random_condition

SMALL = {
    "training__batch_size": 2,
    "student__rank": 4,
    "critic__rank": 4,
    "validation__every": 0,
}


def small_trainer(directory: Path, **overrides: object) -> Trainer:
    config = demo_config(directory, **(SMALL | overrides))
    generator = torch.Generator().manual_seed(3)
    data = TrainingData.in_memory(
        captions=["a scene"] * 6,
        condition=random_condition(6, generator),
        real=RealImages(
            latents=torch.randn(5, 4, 16, 16, generator=generator),
            condition=random_condition(5, generator),
        ),
    )
    return build_trainer(config, random_components(), data, Accelerator(cpu=True))


def weights(trainer: Trainer, role: str) -> torch.Tensor:
    parameters = trainer.distiller.unet.parameters_of(role)
    return torch.cat([p.detach().flatten().clone() for p in parameters])


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


def test_accumulated_micro_batches_give_the_mean_of_their_gradients(tmp_path: Path) -> None:
    """Two micro-batches of 1, the second's data and noise known: gradients average, not add."""
    trainer = small_trainer(
        tmp_path / "run", training__batch_size=1, training__gradient_accumulation_steps=2
    )
    seen = {}
    update = trainer.student.apply
    parameters = trainer.distiller.unet.parameters_of("student")

    def spy(num_accumulated: int) -> torch.Tensor:
        seen["sum"] = torch.cat([p.grad.flatten().clone() for p in parameters])
        return update(num_accumulated)

    trainer.student = type("Spy", (), {"apply": staticmethod(spy)})()
    trainer.iterate(0)
    alone = []
    for micro in range(2):
        fresh = small_trainer(tmp_path / f"micro{micro}", training__batch_size=1,
                              training__gradient_accumulation_steps=2)  # fmt: skip
        batch, noise = fresh._batch_and_noise(0, micro)
        step = trainer.step_index(0)
        sample = fresh.distiller.student_sample(batch, step, noise, with_graph=True)
        fresh.distiller.generator_step(sample, noise)
        grads = [p.grad.flatten() for p in fresh.distiller.unet.parameters_of("student")]
        alone.append(torch.cat(grads))
    torch.testing.assert_close(seen["sum"], alone[0] + alone[1], rtol=1e-5, atol=1e-8)


def test_a_diverged_update_stops_the_run_and_names_side_and_iteration(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    with torch.no_grad():
        trainer.distiller.unet.parameters_of("critic")[1][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"critic's gradient is nan at iteration 3"):
        trainer.iterate(3)


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
