"""What a recipe and the widgets say together: a connected recipe decides, a changed widget wins."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..dmd2_core import Recipe, StepPlan

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
    start_step: int,
    conditioning_timestep: int | None,
) -> StepPlan:
    """The plan of the scheduler node.

    `timesteps` (a list) goes before `steps` (0: not set), before the recipe, before DMD2's own 4
    steps. `conditioning_timestep` is what the model is patched to, None for an unpatched model.
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
    plan = StepPlan(
        timesteps=tuple(chosen), conditioning_timestep=conditioning_timestep, start=start_step
    )
    if not plan.is_integer:
        raise ValueError(
            f"the recipe's timesteps are noise levels ({plan.timesteps[0]}, ...), not steps "
            "0..999: this LoRA is for another kind of model than SDXL or SD1.5"
        )
    return plan


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
    wanted = recipe.conditioning_timestep
    if wanted is not None and not isinstance(wanted, int):
        raise ValueError(
            f"the recipe's conditioning timestep is {wanted}, not an integer 0..999: this LoRA is "
            "for another kind of model than SDXL or SD1.5"
        )
    return wanted


def noise_strength(recipe: Recipe | None, strength: float) -> float | tuple[float, ...]:
    """The share of fresh noise, one number or one per re-injection."""
    if recipe is None or strength != DEFAULT_STRENGTH:
        return strength
    return recipe.strength


def describe(recipe: Recipe | None) -> str:
    """One line about the recipe, for people."""
    if recipe is None:
        steps = ", ".join(map(str, StepPlan.evenly(DEFAULT_STEPS).timesteps))
        return f"The file has no recipe: DMD2's usual steps {steps} apply unless you choose others."
    parts = [f"steps {', '.join(map(str, recipe.timesteps))}"]
    if recipe.conditioning_timestep is not None:
        parts.append(f"conditioning timestep {recipe.conditioning_timestep}")
    parts += [f"{recipe.prediction} prediction", f"cfg {recipe.guidance:g}"]
    if recipe.strength != DEFAULT_STRENGTH:
        parts.append(f"noise strength {recipe.strength}")
    if recipe.base_model is not None:
        parts.append(f"base model {recipe.base_model}")
    return f"Recipe: {'; '.join(parts)}."
