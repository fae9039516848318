"""Random step grids: what is drawn, and that one student then serves 2 to 8 steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmd2_core import StepPlan, VPSchedule, derived_generator, step_ranges
from train_lora.export import read_lora
from train_lora.models.text import Condition
from train_lora.sampling import sample_latents
from train_lora.step_grids import drawn_plan
from train_lora.trainer import Trainer, build_trainer

from .tiny import demo_config, random_components, random_condition, small_data, small_trainer

RANGE = "[2, 8]"

# -- what is drawn ---------------------------------------------------------------------------------


def test_numbers_of_steps_are_equally_likely_and_places_fill_their_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    plans = [drawn_plan((2, 8), generator).timesteps for _ in range(7000)]
    counts = Counter(len(plan) for plan in plans)
    assert set(counts) == set(range(2, 9))
    # 1000 expected, with a deviation of 29.
    assert all(abs(count - 1000) < 150 for count in counts.values())
    for num_steps in range(2, 9):
        drawn = torch.tensor([plan for plan in plans if len(plan) == num_steps]).double()
        assert (drawn[:, 0] == 999).all()
        for i in range(1, num_steps):
            column, spacing = drawn[:, i], 1000 / num_steps
            # Uniform over a spacing: its deviation / sqrt(900) is 1% of the spacing.
            assert column.mean().item() == pytest.approx(999.5 - i * spacing, abs=0.05 * spacing)
            assert column.min() < 999.5 - (i + 0.47) * spacing
            assert column.max() > 999.5 - (i - 0.47) * spacing


def test_every_iteration_has_a_plan_of_its_own_that_the_seed_decides(tmp_path: Path) -> None:
    one, again, other = (
        small_trainer(tmp_path / name, sampling__random_steps=RANGE, training__seed=seed)
        for name, seed in (("one", 5), ("again", 5), ("other", 6))
    )
    plans = [one.plan_of(i) for i in range(60)]
    assert [again.plan_of(i) for i in reversed(range(60))] == plans[::-1]
    assert [other.plan_of(i) for i in range(60)] != plans
    assert len(set(plans)) > 55
    assert all(plan.timesteps[0] == 999 and 2 <= len(plan.timesteps) <= 8 for plan in plans)
    steps = [one.step_index(i) for i in range(60)]
    assert all(step < len(plan.timesteps) for step, plan in zip(steps, plans, strict=True))
    assert max(steps) > 4


def test_without_a_range_the_plan_and_the_draws_are_the_papers(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", training__seed=5)
    assert [trainer.plan_of(i) for i in range(5)] == [StepPlan.evenly(4)] * 5
    found = [trainer.step_index(i) for i in range(40)]
    drawn = [torch.randint(4, (), generator=derived_generator(5, 1, i)).item() for i in range(40)]
    assert found == drawn


def test_the_student_is_trained_at_the_drawn_steps(tmp_path: Path) -> None:
    """The times at which the student is called in an iteration: the drawn plan's, up to the step
    of the iteration."""
    trainer = small_trainer(
        tmp_path / "run", sampling__random_steps=RANGE, training__gradient_accumulation_steps=2
    )
    unet, seen = trainer.distiller.unet, []

    def note(module: nn.Module, arguments: tuple, options: dict) -> None:
        if unet.active == "student":
            seen.append(int(arguments[1].flatten()[0]))

    hook = unet.network_of("student").register_forward_pre_hook(note, with_kwargs=True)
    for iteration in (1, 2, 4):
        seen.clear()
        trainer.iterate(iteration)
        plan, step = trainer.plan_of(iteration), trainer.step_index(iteration)
        assert seen == [*plan.timesteps[: step + 1]] * 2  # in both micro-batches
    hook.remove()


# -- what the file says ----------------------------------------------------------------------------


def test_the_exported_file_names_its_range(tmp_path: Path) -> None:
    for name, given in (("range", RANGE), ("fixed", "none")):
        trainer = small_trainer(tmp_path / name, sampling__random_steps=given)
        trainer.export(tmp_path / f"{name}.safetensors")
    _, ranged = read_lora(tmp_path / "range.safetensors")
    _, fixed = read_lora(tmp_path / "fixed.safetensors")
    assert ranged.timesteps == fixed.timesteps == (999, 749, 499, 249)
    assert ranged.trained_steps == (2, 8)
    assert fixed.trained_steps is None


# -- a student that serves them all ----------------------------------------------------------------

MEAN, DEVIATION = 0.6, 0.5
"""Of the pixels of all images, independent of each other: then every network here is known."""
VP = VPSchedule.sdxl()
KNOT_SPACING = 125


class PixelRoles(nn.Module):
    """Teacher: the exact v of such images. Student and critic: that plus a(t) * x_t + c(t).

    a and c are linear between knots, which lie at multiples of 125: a training at 999, 749, 499 and
    249 moves every second knot and leaves the others to the teacher.
    """

    def __init__(self) -> None:
        super().__init__()
        shape = (1000 // KNOT_SPACING + 1, 2)
        self.knots = nn.ParameterDict(
            {role: nn.Parameter(torch.zeros(shape)) for role in ("student", "critic")}
        )
        self.active = "teacher"
        self.needs_all_processes = False

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        before, self.active = self.active, name
        yield
        self.active = before

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return [self.knots[role]]

    def role_state_dict(self, role: str) -> dict[str, Tensor]:
        return {"knots": self.knots[role]}

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        column = t.view(-1, 1, 1, 1)
        alpha, sigma = VP.alpha(column).float(), VP.sigma(column).float()
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        v = (alpha * x_t - (MEAN + gain * (x_t - alpha * MEAN))) / sigma
        if self.active == "teacher":
            return v
        place = (t + 1) / KNOT_SPACING
        low = place.long().clamp(max=len(self.knots[self.active]) - 2)
        share = (place - low)[:, None]
        knots = self.knots[self.active]
        a, c = ((1 - share) * knots[low] + share * knots[low + 1]).unbind(1)
        return v + a.view_as(column) * x_t + c.view_as(column)


def pixel_trainer(directory: Path, **overrides: object) -> Trainer:
    settings = {
        "gan__enabled": "false",
        "distribution_matching__guidance": 1,
        "student__learning_rate": 0.02,
        "critic__learning_rate": 0.04,
        "training__batch_size": 4,
        "training__iterations": 900,
        "validation__every": 0,
        "export__thumbnail": "false",
    }
    config = demo_config(directory, **settings | overrides)
    components = replace(random_components(), prediction="v")
    return build_trainer(config, components, small_data(), Accelerator(cpu=True), PixelRoles())


def distance(trainer: Trainer, num_steps: int) -> float:
    """Squared Wasserstein distance of the pixels, as Gaussians, in evenly spaced steps."""
    condition = random_condition(8, torch.Generator().manual_seed(4))
    with trainer.average.applied():
        pixels = sample_latents(
            trainer.distiller.unet, "student", trainer.distiller.components, condition,
            StepPlan.evenly(num_steps), seed=7,
        )  # fmt: skip
    return (pixels.mean().item() - MEAN) ** 2 + (pixels.std().item() - DEVIATION) ** 2


def test_one_student_serves_2_to_8_steps(tmp_path: Path) -> None:
    """Better than the untrained one in each number of steps, and than one that was trained at 4
    steps in its worst."""
    ranged = pixel_trainer(tmp_path / "range", sampling__random_steps=RANGE)
    fixed = pixel_trainer(tmp_path / "fixed")
    numbers = range(2, 9)
    untrained = {n: distance(ranged, n) for n in numbers}
    for iteration in range(ranged.config.training.iterations):
        ranged.iterate(iteration)
        fixed.iterate(iteration)
    found, at_four = ({n: distance(t, n) for n in numbers} for t in (ranged, fixed))
    print(untrained, found, at_four, sep="\n")
    assert all(found[n] < 0.2 * untrained[n] for n in numbers)
    assert max(found.values()) < 0.2 * max(at_four.values())
    assert at_four[4] < 0.2 * untrained[4]  # it did learn its own


def test_step_ranges_hold_the_evenly_spaced_plans() -> None:
    for num_steps in range(1, 101):
        ranges = step_ranges(num_steps)
        plan = StepPlan.evenly(num_steps).timesteps
        assert all(t in places for t, places in zip(plan, ranges, strict=True))
        assert all(b.stop <= a.start for a, b in zip(ranges, ranges[1:], strict=False))
        assert ranges[-1].start > 0 or num_steps == 1
