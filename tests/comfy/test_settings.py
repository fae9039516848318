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
    widgets = {"recipe": None, "steps": 0, "timesteps": "", "start_step": 0}
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
    assert settings.noise_strength(six, 1.0) == 0.5
    assert settings.noise_strength(six, 0.8) == 0.8
    assert settings.noise_strength(None, 1.0) == 1.0


def test_starting_later_leaves_the_first_steps_out(settings):
    assert plan(settings, start_step=2).active == (499, 249)


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"timesteps": "499, 749"}, "timesteps must descend, got 749 after 499"),
        ({"timesteps": "999, 999"}, "timesteps must descend, got 999 after 999"),
        ({"timesteps": "1000, 500"}, "timesteps has 1000, outside the integers 0..999"),
        ({"timesteps": "500, -1"}, "timesteps has -1, outside the integers 0..999"),
        ({"timesteps": "999, 499", "steps": 4}, "steps is 4 but timesteps lists 2"),
        ({"start_step": 4}, "start is 4 but the plan has 4 steps"),
        ({"start_step": 1, "conditioning_timestep": 399}, "belongs to pure noise"),
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
