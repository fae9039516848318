"""Random step grids: what is drawn, and that one student then serves 2 to 8 steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from dmd2_core import StepPlan, VPSchedule, derived_generator, step_ranges
from train_lora.config_load import load
from train_lora.config_text import to_toml
from train_lora.data.training_data import TrainingData
from train_lora.export import read_lora
from train_lora.models.text import Condition, size_ids
from train_lora.sampling import sample_latents
from train_lora.step_grids import drawn_plan
from train_lora.trainer import Trainer, build_trainer

from .tiny import demo_config, random_components, random_condition, small_trainer

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
    trainer = pixel_trainer(tmp_path / "run", sampling__random_steps=RANGE, training__seed=5)
    plans = [trainer.plan_of(i) for i in range(60)]
    assert [trainer.plan_of(i) for i in reversed(range(60))] == plans[::-1]
    steps = [trainer.step_index(i) for i in range(60)]
    assert len(set(plans)) > 55
    assert all(plan.timesteps[0] == 999 and 2 <= len(plan.timesteps) <= 8 for plan in plans)
    assert all(step < len(plan.timesteps) for step, plan in zip(steps, plans, strict=True))
    assert max(steps) > 4
    parts = trainer.config.training
    trainer.config = replace(trainer.config, training=replace(parts, seed=6))
    assert [trainer.plan_of(i) for i in range(60)] != plans


def test_without_a_range_the_plan_and_the_draws_are_the_papers(tmp_path: Path) -> None:
    trainer = pixel_trainer(tmp_path / "run", training__seed=5)
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
        if unet.active_role == "student":
            seen.append(int(arguments[1].flatten()[0]))

    hook = unet.network_of("student").register_forward_pre_hook(note, with_kwargs=True)
    for iteration in (1, 2, 4):
        seen.clear()
        trainer.iterate(iteration)
        plan, step = trainer.plan_of(iteration), trainer.step_index(iteration)
        assert seen == [*plan.timesteps[: step + 1]] * 2  # in both micro-batches
    hook.remove()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_steps": "[8, 2]"}, r"is \[8, 2\]; set it to the fewest and the most steps"),
        ({"random_steps": "[1, 1]"}, r"is \[1, 1\]; set it to the fewest and the most steps"),
        ({"random_steps": "[2, 101]"}, "set each of its numbers to at least 1 and at most 100"),
        ({"random_steps": "[2]"}, 'set it to a list of 2 whole numbers in brackets or "none"'),
        ({"random_steps": "[5, 8]"}, "the file, is 4; set it to one of 5 to 8"),
        (
            {"random_steps": RANGE, "timesteps": "[999, 499]"},
            r"sampling.timesteps is \[999, 499\]; remove one of them",
        ),
        (
            {"random_steps": "[1, 4]", "steps": 1, "conditioning_timestep": 399},
            "sampling.conditioning_timestep is 399; remove one of them",
        ),
    ],
)
def test_what_contradicts_a_range_is_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        demo_config(tmp_path, **{f"sampling__{key}": value for key, value in settings.items()})


def test_a_regression_wants_one_step_in_every_iteration(tmp_path: Path) -> None:
    message = (
        r'random_steps is \[1, 4\], but .* set sampling.random_steps to "none" and sampling.st'
    )
    with pytest.raises(ValueError, match=message):
        demo_config(
            tmp_path,
            training__objective="dmd",
            regression__pairs="pairs",
            sampling__random_steps="[1, 4]",
        )


def test_a_range_survives_the_config_file(tmp_path: Path) -> None:
    config = demo_config(tmp_path, sampling__random_steps=RANGE)
    (tmp_path / "again.toml").write_text(to_toml(config))
    again = load(file=tmp_path / "again.toml").config
    assert again == config
    assert again.sampling.random_steps == (2, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_steps": "[1, 4]"}, r"random_steps is \[1, 4\], but .* begin at 2"),
        ({"random_steps": "[2, 100]"}, "may be 5 below the first; set .* to at most 5"),
    ],
)
def test_an_anchor_needs_a_later_step_in_every_plan(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    given = {f"sampling__{key}": value for key, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        demo_config(tmp_path, diversity_anchor__weight=0.05, **given)


def test_the_anchor_follows_the_drawn_plan_and_the_rest_is_shared(tmp_path: Path) -> None:
    trainer = pixel_trainer(
        tmp_path / "run", sampling__random_steps=RANGE, diversity_anchor__weight=0.05
    )
    assert all(trainer.step_index(i) >= 1 for i in range(40))
    for iteration in range(20):
        plan = trainer.plan_of(iteration)
        drawn = trainer.distiller.at(plan)
        assert drawn.plan == plan
        assert drawn.anchor.timesteps[-1] == plan.timesteps[1]
        assert drawn.adversary is trainer.distiller.adversary  # it keeps a running mean
        assert trainer.distiller.plan == StepPlan.evenly(4)


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
    with safe_open(tmp_path / "range.safetensors", "pt") as file:
        told = file.metadata()
    assert told["modelspec.title"].endswith("DMD2 in 2 to 8 steps")
    assert told["modelspec.usage_hint"].startswith("4 steps (or 2 to 8 steps), CFG 1")


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
        "student__learning_rate": 0.01,
        "critic__learning_rate": 0.05,
        "critic__updates_per_generator": 2,
        "training__betas": "[0.5, 0.99]",
        "training__batch_size": 32,
        "training__iterations": 400,
        "validation__every": 0,
        "export__thumbnail": "false",
    }
    config = demo_config(directory, **settings | overrides)
    components = replace(random_components(), prediction="v")
    data = TrainingData.in_memory(captions=["a scene"] * 4, condition=small_pictures(4), real=None)
    return build_trainer(config, components, data, Accelerator(cpu=True), PixelRoles())


def small_pictures(count: int) -> Condition:
    """Of 64 numbers each."""
    condition = random_condition(count, torch.Generator().manual_seed(4))
    return replace(condition, time_ids=size_ids(count, 32, 32))


def distance(trainer: Trainer, num_steps: int) -> float:
    """Squared Wasserstein distance of the pixels, as Gaussians, in evenly spaced steps."""
    condition = small_pictures(64)
    with trainer.average.applied():
        pixels = sample_latents(
            trainer.distiller.unet, "student", trainer.distiller.components, condition,
            StepPlan.evenly(num_steps), seed=7,
        )  # fmt: skip
    return (pixels.mean().item() - MEAN) ** 2 + (pixels.std().item() - DEVIATION) ** 2


def test_one_student_serves_2_to_8_steps(tmp_path: Path) -> None:
    """Better than the untrained one in each number of steps, and better in its worst number than
    one that was trained at 4 steps, which knows nothing of the times between.

    What is left is the critic's: it knows the samples of all steps together only, so that two steps
    may err in opposite directions. Other seeds leave up to 0.6 of the untrained student's distance.
    """
    ranged = pixel_trainer(tmp_path / "range", sampling__random_steps=RANGE)
    fixed = pixel_trainer(tmp_path / "fixed")
    numbers = range(2, 9)
    untrained = {n: distance(ranged, n) for n in numbers}
    for iteration in range(ranged.config.training.iterations):
        ranged.iterate(iteration)
        fixed.iterate(iteration)
    found, at_four = ({n: distance(t, n) for n in numbers} for t in (ranged, fixed))
    assert all(found[n] < 0.8 * untrained[n] for n in numbers), (untrained, found)
    assert max(found.values()) < max(at_four.values()), (found, at_four)
    assert at_four[4] < 0.5 * untrained[4]  # it did learn its own


def test_step_ranges_hold_the_evenly_spaced_plans() -> None:
    for num_steps in range(1, 101):
        ranges = step_ranges(num_steps)
        plan = StepPlan.evenly(num_steps).timesteps
        assert all(t in places for t, places in zip(plan, ranges, strict=True))
        assert all(b.stop <= a.start for a, b in pairwise(ranges))
        assert ranges[-1].start > 0 or num_steps == 1
