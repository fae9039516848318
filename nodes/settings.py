"""What a recipe and the widgets say together: a connected recipe decides, a changed widget wins."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from ..dmd2_core import Recipe, StepPlan

NUM_TIMESTEPS = 1000
DEFAULT_STEPS = 4
DEFAULT_STRENGTH = 1.0
DEFAULT_CONDITIONING_TIMESTEP = 399


def parse_timesteps(text: str) -> tuple[int, ...]:
    """The integers in "999, 749, 499, 249" (commas, semicolons or spaces); () for an empty text."""
    words = re.split(r"[\s,;]+", text.strip())
    if words == [""]:
        return ()
    for word in words:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", word):
            raise ValueError(
                f"timesteps has {word!r}, which is not a whole number: "
                "write a list such as 999, 749, 499, 249, or leave it empty"
            )
    return tuple(int(word) for word in words)


def step_plan(
    *,
    recipe: Recipe | None,
    steps: int,
    timesteps: str,
    denoise: float,
    conditioning_timestep: int | None,
) -> StepPlan:
    """The plan of the scheduler node.

    `timesteps` (a list) goes before `steps` (0: not set), before the recipe, before DMD2's own 4
    steps. `denoise` in (0, 1] chooses the first step to run, see `first_step`.
    `conditioning_timestep` is what the model is patched to, None for an unpatched model.
    """
    listed = parse_timesteps(timesteps)
    if listed and steps not in (0, len(listed)):
        raise ValueError(
            f"steps is {steps} but timesteps lists {len(listed)}: "
            "set steps to 0, or leave timesteps empty"
        )
    if listed:
        chosen: Sequence[int | float] = listed
    elif steps:
        chosen = StepPlan.evenly(steps).timesteps
    elif recipe is not None:
        chosen = recipe.timesteps
        _check_conditioning(recipe.conditioning_timestep, conditioning_timestep)
    else:
        chosen = StepPlan.evenly(DEFAULT_STEPS).timesteps
    plan = StepPlan(timesteps=tuple(chosen), conditioning_timestep=conditioning_timestep)
    if not plan.is_integer:
        raise ValueError(
            f"the recipe's timesteps are noise levels ({plan.timesteps[0]}, ...), not steps "
            "0..999: this LoRA is for another kind of model than SDXL or SD1.5"
        )
    if denoise < 1 and conditioning_timestep is not None:
        raise ValueError(
            f"denoise is {denoise:g}, but a model with a conditioning timestep always starts from "
            "pure noise: set denoise to 1, or use a model of several steps for image to image"
        )
    return dataclasses.replace(plan, start=first_step(plan.timesteps, denoise))


def first_step(timesteps: Sequence[int | float], denoise: float) -> int:
    """The index of the trained timestep nearest to `denoise` of the way from 0 to 999.

    A model of few steps knows its own timesteps only, so an amount of denoising in between snaps to
    one of them: of 999, 749, 499, 249 an amount of 0.7 starts at 749. 1 is always the first.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise:g}: choose more than 0 (little changes) up to 1")
    wanted = denoise * NUM_TIMESTEPS - 1
    return min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - wanted))


def describe_plan(plan: StepPlan, denoise: float, recipe: Recipe | None = None) -> str:
    """The steps that will run, for people: where `denoise` snapped to, and whether some of them are
    not those that the LoRA was trained at, if `recipe` says."""
    num, listed = len(plan.timesteps), ", ".join(map(str, plan.active))
    if plan.start == 0:
        text = f"{num} step{'s' * (num > 1)}: {listed}."
    elif plan.start == num - 1:
        text = f"Step {num} of {num}: {listed}."
    else:
        text = f"Steps {plan.start + 1} to {num} of {num}: {listed}."
    if plan.conditioning_timestep is not None:
        text += f" The network is told {plan.conditioning_timestep} at the first."
    if denoise < 1:
        first = plan.active[0]
        amount = (first + 1) / NUM_TIMESTEPS
        text += f" Denoise {denoise:g} starts at the trained timestep {first} ({amount:g})."
    if recipe is not None and not (recipe.knows(plan.timesteps) or recipe.knows(plan.active)):
        text += f" {_trained(recipe)}"
    return text


def _trained(recipe: Recipe) -> str:
    """What the LoRA was trained for, said where something else is to run."""
    if recipe.trained_steps is not None:
        counts = "{} to {}".format(*recipe.trained_steps)
        return f"The LoRA was trained for {counts} evenly spaced steps; others are new to it."
    trained = ", ".join(map(str, recipe.timesteps))
    return f"The LoRA was trained at {trained}; other timesteps are new to it."


def _check_conditioning(wanted: int | float | None, patched: int | None) -> None:
    """The recipe's conditioning timestep must be the one that the model is patched to."""
    if wanted == patched:
        return
    if wanted is None:
        raise ValueError(
            f"the model is patched to conditioning timestep {patched}, but the recipe has none: "
            "connect the recipe to DMD2 Conditioning Timestep, or remove that node"
        )
    state = "not patched" if patched is None else f"patched to {patched}"
    raise ValueError(
        f"the recipe needs conditioning timestep {wanted}, but the model is {state}: pass the "
        "model through DMD2 Conditioning Timestep with the recipe connected, and connect its "
        "output here and to the sampling node"
    )


def conditioning_timestep(recipe: Recipe | None, timestep: int) -> int | None:
    """What to patch the model to; None: leave the model as it is."""
    if recipe is None or timestep != DEFAULT_CONDITIONING_TIMESTEP:
        return timestep
    return recipes_conditioning(recipe)


def recipes_conditioning(recipe: Recipe) -> int | None:
    """The recipe's conditioning timestep, None if it has none."""
    wanted = recipe.conditioning_timestep
    if wanted is not None and not isinstance(wanted, int):
        raise ValueError(
            f"the recipe's conditioning timestep is {wanted}, not an integer 0..999: this LoRA is "
            "for another kind of model than SDXL or SD1.5"
        )
    return wanted


def parse_strengths(text: str) -> tuple[float, ...]:
    """The numbers in "1, 0.5, 0" (commas, semicolons or spaces); () for an empty text."""
    words = re.split(r"[\s,;]+", text.strip())
    if words == [""]:
        return ()
    for word in words:
        if not re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,9}", word) or float(word) > 1:
            raise ValueError(
                f"strengths has {word!r}, which is not a number from 0 to 1: write one per step "
                "after the first, such as 1, 0.5, 0.2, or leave it empty"
            )
    return tuple(float(word) for word in words)


def noise_strength(strength: float, strengths: str) -> float | tuple[float, ...] | None:
    """The share of fresh noise that the widgets ask for: one number, one per re-injection, or None
    if both are at their defaults, so that a recipe decides."""
    listed = parse_strengths(strengths)
    if listed and strength != DEFAULT_STRENGTH:
        raise ValueError(
            f"strength is {strength:g} but strengths lists {len(listed)}: set strength to "
            f"{DEFAULT_STRENGTH:g}, or leave strengths empty"
        )
    if listed:
        return listed
    return None if strength == DEFAULT_STRENGTH else strength


def describe(recipe: Recipe | None) -> str:
    """One line about the recipe, for people."""
    if recipe is None:
        steps = ", ".join(map(str, StepPlan.evenly(DEFAULT_STEPS).timesteps))
        return f"The file has no recipe: DMD2's usual steps {steps} apply unless you choose others."
    parts = [f"steps {', '.join(map(str, recipe.timesteps))}"]
    if recipe.trained_steps is not None:
        parts.append("trained for {} to {} evenly spaced steps".format(*recipe.trained_steps))
    if recipe.conditioning_timestep is not None:
        parts.append(f"conditioning timestep {recipe.conditioning_timestep}")
    parts += [f"{recipe.prediction} prediction", f"cfg {recipe.guidance:g}"]
    if recipe.strength != DEFAULT_STRENGTH:
        parts.append(f"noise strength {recipe.strength}")
    if recipe.base_model is not None:
        parts.append(f"base model {recipe.base_model}")
    return f"Recipe: {'; '.join(parts)}."
