"""A connected recipe decides, a changed widget wins: nodes/settings.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Pack = Callable[[str], ModuleType]


@pytest.fixture
def settings(pack: Pack) -> ModuleType:
    return pack("nodes.settings")


@pytest.fixture
def recipe(pack: Pack) -> Callable[..., Any]:
    return pack("dmd2_core").Recipe


def plan(settings: ModuleType, **changed: Any) -> Any:
    widgets = {"recipe": None, "steps": 0, "timesteps": "", "denoise": 1.0}
    return settings.step_plan(**widgets | {"conditioning_timestep": None} | changed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  ", ()),
        ("999", (999,)),
        ("999, 749, 499, 249", (999, 749, 499, 249)),
        (" 999 749;499,  249 ", (999, 749, 499, 249)),
    ],
)
def test_lists_of_timesteps_are_read(settings, text, expected):
    assert settings.parse_timesteps(text) == expected


@pytest.mark.parametrize("text", ["99x", "999, 7.5", "999 -", "1e3", "999,", "٣"])
def test_other_words_are_refused_by_name(settings, text):
    bad = "" if text == "999," else text.split()[-1].split(",")[-1]
    with pytest.raises(ValueError, match="write a list such as 999, 749, 499, 249") as error:
        settings.parse_timesteps(text)
    assert repr(bad) in str(error.value)


def test_without_recipe_or_widgets_it_is_four_steps(settings):
    assert plan(settings).timesteps == (999, 749, 499, 249)


def test_a_recipe_decides_until_a_widget_is_changed(settings, recipe):
    six = recipe(timesteps=(999, 800, 600, 400, 200, 100), strength=0.5)
    assert plan(settings, recipe=six).timesteps == six.timesteps
    assert plan(settings, recipe=six, steps=2).timesteps == (999, 499)
    assert plan(settings, recipe=six, timesteps="999 10").timesteps == (999, 10)
    assert settings.noise_strength(1.0, "") is None
    assert settings.noise_strength(0.8, "") == 0.8
    assert settings.noise_strength(1.0, "1, .5 0") == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("denoise", "steps"),
    [
        (1.0, (999, 749, 499, 249)),
        (0.9, (999, 749, 499, 249)),
        (0.87, (749, 499, 249)),
        (0.75, (749, 499, 249)),
        (0.6, (499, 249)),
        (0.3, (249,)),
        (0.01, (249,)),
    ],
)
def test_denoise_snaps_to_the_nearest_trained_step(settings, denoise, steps):
    found = plan(settings, denoise=denoise)
    assert found.active == steps
    said = settings.describe_plan(found, denoise)
    assert ", ".join(map(str, steps)) in said
    amount = (steps[0] + 1) / 1000
    snapped = f"Denoise {denoise:g} starts at the trained timestep {steps[0]} ({amount:g})."
    assert (snapped in said) == (denoise < 1)


def test_a_plan_is_described_in_words(settings):
    assert settings.describe_plan(plan(settings), 1.0) == "4 steps: 999, 749, 499, 249."
    one = plan(settings, steps=1, conditioning_timestep=399)
    assert settings.describe_plan(one, 1.0) == (
        "1 step: 999. The network is told 399 at the first."
    )
    assert settings.describe_plan(plan(settings, denoise=0.5), 0.5) == (
        "Steps 3 to 4 of 4: 499, 249. Denoise 0.5 starts at the trained timestep 499 (0.5)."
    )


@pytest.mark.parametrize("text", ["half", "1 2", "0.5,,x", "-1", "1e-1", "nan"])
def test_other_strengths_are_refused(settings, text):
    with pytest.raises(ValueError, match="which is not a number from 0 to 1"):
        settings.noise_strength(1.0, text)


def test_two_kinds_of_strength_contradict_each_other(settings):
    with pytest.raises(ValueError, match=r"strength is 0\.5 but strengths lists 2"):
        settings.noise_strength(0.5, "1 0")


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"timesteps": "499, 749"}, "timesteps must descend, got 749 after 499"),
        ({"timesteps": "999, 999"}, "timesteps must descend, got 999 after 999"),
        ({"timesteps": "1000, 500"}, "timesteps has 1000, outside the integers 0..999"),
        ({"timesteps": "500, -1"}, "timesteps has -1, outside the integers 0..999"),
        ({"timesteps": "999, 499", "steps": 4}, "steps is 4 but timesteps lists 2"),
        ({"denoise": 1.5}, "denoise is 1.5: choose"),
        ({"denoise": -0.1}, "denoise is -0.1: choose"),
        (
            {"steps": 1, "denoise": 0.5, "conditioning_timestep": 399},
            "always starts from pure noise",
        ),
    ],
)
def test_impossible_plans_are_refused(settings, widgets, message):
    with pytest.raises(ValueError, match=message):
        plan(settings, **widgets)


def test_the_recipes_conditioning_timestep_needs_its_patch(settings, recipe):
    one_step = recipe(timesteps=(999,), conditioning_timestep=399)
    assert plan(settings, recipe=one_step, conditioning_timestep=399).told(0) == 399
    with pytest.raises(ValueError, match="pass the model through DMD2 Conditioning Timestep"):
        plan(settings, recipe=one_step)
    with pytest.raises(ValueError, match="but the recipe has none"):
        plan(settings, recipe=recipe(timesteps=(999,)), conditioning_timestep=399)


def test_what_the_conditioning_timestep_node_patches_to(settings, recipe):
    one_step, four_steps = (
        recipe(timesteps=(999,), conditioning_timestep=249),
        recipe(timesteps=(999, 749, 499, 249)),
    )
    assert settings.conditioning_timestep(None, 399) == 399
    assert settings.conditioning_timestep(one_step, 399) == 249
    assert settings.conditioning_timestep(one_step, 500) == 500
    assert settings.conditioning_timestep(four_steps, 399) is None


def test_a_recipe_of_noise_levels_is_refused(settings, recipe):
    with pytest.raises(ValueError, match="another kind of model than SDXL"):
        plan(settings, recipe=recipe(timesteps=(80.0, 2.5)))


def test_a_recipe_is_described_in_words(settings, recipe):
    said = settings.describe(recipe(timesteps=(999,), conditioning_timestep=399, base_model="B"))
    assert said == (
        "Recipe: steps 999; conditioning timestep 399; epsilon prediction; cfg 1; base model B."
    )
    assert "999, 749, 499, 249" in settings.describe(None)


def test_a_range_of_trained_steps_is_accepted_and_placed_evenly(settings, recipe):
    ranged = recipe(timesteps=(999, 749, 499, 249), trained_steps=(2, 8))
    assert plan(settings, recipe=ranged).timesteps == ranged.timesteps
    for steps in range(2, 9):
        found = plan(settings, recipe=ranged, steps=steps)
        evenly = [999 - i * 1000 // steps for i in range(steps)]
        assert found.timesteps == tuple(evenly)
        assert "new to it" not in settings.describe_plan(found, 1.0, ranged)
    later = plan(settings, recipe=ranged, steps=8, denoise=0.5)
    assert later.active == (499, 374, 249, 124)
    assert "new to it" not in settings.describe_plan(later, 0.5, ranged)
    twelve = settings.describe_plan(plan(settings, recipe=ranged, steps=12), 1.0, ranged)
    assert twelve.endswith(
        "The LoRA was trained for 2 to 8 evenly spaced steps; others are new to it."
    )
    assert settings.describe(ranged).startswith(
        "Recipe: steps 999, 749, 499, 249; trained for 2 to 8 evenly spaced steps; epsilon"
    )


def test_steps_that_a_lora_of_a_fixed_plan_does_not_know_are_named(settings, recipe):
    fixed = recipe(timesteps=(999, 749, 499, 249))
    said = settings.describe_plan(plan(settings, recipe=fixed, steps=8), 1.0, fixed)
    assert said.endswith(
        "The LoRA was trained at 999, 749, 499, 249; other timesteps are new to it."
    )
    assert "new to it" not in settings.describe_plan(plan(settings, recipe=fixed), 1.0, fixed)
