"""The recipe in a LoRA's metadata: round trips, and whatever strangers put there."""

import json
from typing import Any

import pytest

from dmd2_core import Recipe, StepPlan
from dmd2_core.recipe import RECIPE_KEY, STEPS_KEY, VERSION_KEY

FULL = Recipe(
    timesteps=(999, 749, 499, 249),
    prediction="v",
    zero_terminal_snr=True,
    strength=(1.0, 0.5, 0.0),
    guidance=1.0,
    teacher_guidance=8.0,
    lora_rank=64,
    lora_alpha=8.0,
    base_model="My anime fine-tune, v2 (日本語)",
    base_model_hash="sha256:0123abcd",
    trained_with={"iterations": 16000, "lr": 5e-5, "ablate": ["gan"], "seed": None},
)


@pytest.mark.parametrize(
    "recipe",
    [
        FULL,
        Recipe(timesteps=(999,), conditioning_timestep=399),
        Recipe(timesteps=(1.0, 0.75, 0.5), prediction="flow", strength=0.25),
        Recipe(timesteps=(999, 749, 499, 249), trained_steps=(2, 8)),
    ],
)
def test_round_trip(recipe: Recipe) -> None:
    metadata = recipe.to_metadata()
    assert all(isinstance(item, str) for pair in metadata.items() for item in pair)
    assert Recipe.from_metadata({"format": "pt"} | metadata) == recipe
    again = Recipe.from_metadata(metadata)
    assert again is not None
    assert again.to_metadata() == metadata


def test_readers_that_know_no_range_of_steps_read_the_rest() -> None:
    """They refuse keys that they do not know within the recipe, and look at no other."""
    alone = Recipe(timesteps=(999, 749, 499, 249)).to_metadata()
    ranged = Recipe(timesteps=(999, 749, 499, 249), trained_steps=(2, 8)).to_metadata()
    assert set(alone) == {RECIPE_KEY, VERSION_KEY}
    assert {key: ranged[key] for key in alone} == alone
    assert "trained_steps" not in alone[RECIPE_KEY]
    assert ranged[STEPS_KEY] == "[2, 8]"


def test_which_steps_a_student_knows() -> None:
    fixed = Recipe(timesteps=(999, 749, 499, 249))
    ranged = Recipe(timesteps=(999, 749, 499, 249), trained_steps=(2, 8))
    for num_steps in range(1, 12):
        plan = StepPlan.evenly(num_steps).timesteps
        assert fixed.knows(plan) == (num_steps in (1, 2, 4)), num_steps  # 999; 999, 499
        assert ranged.knows(plan) == (num_steps <= 8), num_steps  # 999 alone is among its steps
    assert ranged.knows((999, 600))  # half a spacing around 499
    assert not fixed.knows((999, 600))
    assert not ranged.knows((999, 100))
    assert not ranged.knows((998, 499))


@pytest.mark.parametrize(
    "text", ["", "8", "[2]", "[8, 2]", "[0, 4]", "[1, 1]", "[2, 101]", '["2", "8"]', "[2.0, 8.0]",
             "[true, 8]", "null, 1", "[5, 8]", "[" * 100_000]
)  # fmt: skip
def test_hostile_ranges_of_steps_are_value_errors(text: str) -> None:
    metadata = Recipe(timesteps=(999, 749, 499, 249)).to_metadata()
    with pytest.raises(ValueError, match="recipe is damaged") as caught:
        Recipe.from_metadata(metadata | {STEPS_KEY: text})
    assert len(str(caught.value)) < 500


def test_a_range_of_steps_goes_with_evenly_spaced_ones_only() -> None:
    with pytest.raises(ValueError, match=r"does not go with timesteps \(999, 100\)"):
        Recipe(timesteps=(999, 100), trained_steps=(2, 8))
    with pytest.raises(ValueError, match="and conditioning timestep 399"):
        Recipe(timesteps=(999,), conditioning_timestep=399, trained_steps=(1, 8))
    with pytest.raises(ValueError, match="strength lists one for each step of 2: give one number"):
        Recipe(timesteps=(999, 499), strength=(0.5,), trained_steps=(2, 8))


def test_metadata_bytes_do_not_depend_on_order() -> None:
    first = Recipe(timesteps=(999,), trained_with={"a": 1, "b": 2})
    second = Recipe(timesteps=(999,), trained_with={"b": 2, "a": 1})
    assert first.to_metadata() == second.to_metadata()


def test_plan() -> None:
    assert FULL.plan() == StepPlan.evenly(4)
    assert FULL.plan(start=2) == StepPlan.evenly(4, start=2)
    one = Recipe(timesteps=(999,), conditioning_timestep=399)
    assert one.plan() == StepPlan.evenly(1, conditioning_timestep=399)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "ss_network_dim": "64"}])
def test_other_loras_have_no_recipe(metadata: dict[str, str] | None) -> None:
    assert Recipe.from_metadata(metadata) is None


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"timesteps": []}, "timesteps is empty"),
    ({"timesteps": None}, "timesteps must be a list"),
    ({"timesteps": "999"}, "timesteps must be a list"),
    ({"timesteps": 999}, "timesteps must be a list"),
    ({"timesteps": {"0": 999}}, "timesteps must be a list"),
    ({"timesteps": [999, 1000]}, "1000"),
    ({"timesteps": [249, 999]}, "descend"),
    ({"timesteps": [999, [499]]}, r"\[499\]"),
    ({"timesteps": [999, True]}, "True"),
    ({"timesteps": [10**300, 0.5]}, "noise levels"),
    ({"timesteps": list(range(2000, 0, -1))}, "at most 1000"),
    ({"conditioning_timestep": "399"}, "conditioning_timestep has '399'"),
    ({"conditioning_timestep": -1}, "conditioning_timestep has -1"),
    ({"trained_steps": [8, 2]}, "trained_steps"),
    ({"prediction": "eps"}, "prediction 'eps' is unknown"),
    ({"prediction": ["epsilon"]}, "prediction"),
    ({"zero_terminal_snr": "yes"}, "zero_terminal_snr is 'yes'"),
    ({"zero_terminal_snr": True}, "does not go with prediction 'epsilon'"),
    ({"strength": 2}, "strength is 2"),
    ({"strength": None}, "strength is None"),
    ({"strength": "1"}, "strength is '1'"),
    ({"strength": [1.0]}, "1 values for 3"),
    ({"strength": [1.0, None, 1.0]}, "strength is None"),
    ({"guidance": -1}, "guidance is -1"),
    ({"guidance": True}, "guidance is True"),
    ({"guidance": "7"}, "guidance is '7'"),
    ({"teacher_guidance": 1e9}, "teacher_guidance is 1000000000.0"),
    ({"lora_rank": 0}, "lora_rank is 0"),
    ({"lora_rank": 1.5}, "lora_rank is 1.5: use an integer"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"base_model": ""}, "base_model is ''"),
    ({"base_model": 5}, "base_model is 5"),
    ({"base_model": "a\nb"}, "base_model is"),
    ({"base_model": "x" * 201}, "base_model is"),
    ({"base_model_hash": "../../etc"}, "base_model_hash is"),
    ({"trained_with": [1]}, r"trained_with is \[1\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS)
def test_hostile_fields_are_named(change: dict[str, Any], message: str) -> None:
    data = {"timesteps": [999, 749, 499, 249]} | change
    with pytest.raises(ValueError, match=message):
        Recipe(**data)
    metadata = {RECIPE_KEY: json.dumps(data), VERSION_KEY: "1"}
    with pytest.raises(ValueError, match=f"(?s)recipe is damaged .*{message}.*export") as caught:
        Recipe.from_metadata(metadata)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "{}",
        '{"timesteps": [999], "surprise": 1}',
        '{"timesteps": [999, 499], "trained_steps": [2, 8]}',  # it belongs beside the recipe
        '{"timesteps": [NaN]}',
        '{"timesteps": [Infinity]}',
        '{"timesteps": [1e999]}',
        '{"timesteps": [999], "guidance": NaN}',
        '{"timesteps": [999], "guidance": ' + "9" * 5000 + "}",
        '{"timesteps": [999], "trained_with": {"lr": NaN}}',
        '{"timesteps": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"timesteps": [999], "trained_with": {"a": '
        + "[" * 900
        + "]" * 900
        + "}}"
        + " " * (1 << 20),
    ],
)
def test_hostile_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="recipe is damaged") as caught:
        Recipe.from_metadata({RECIPE_KEY: text, VERSION_KEY: "1"})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("version", [None, "2", "", 1])
def test_other_versions_are_refused(version: Any) -> None:
    metadata = FULL.to_metadata() | {VERSION_KEY: version}
    with pytest.raises(ValueError, match=r"version .* reads '1': update it"):
        Recipe.from_metadata(metadata)


def test_metadata_that_is_not_text() -> None:
    metadata: Any = {RECIPE_KEY: {"timesteps": [999]}, VERSION_KEY: "1"}
    with pytest.raises(ValueError, match="recipe is damaged"):
        Recipe.from_metadata(metadata)


def test_what_cannot_be_written_is_refused_before_training_ends() -> None:
    for value in (float("inf"), object()):
        with pytest.raises(ValueError, match="trained_with is not JSON"):
            Recipe(timesteps=(999,), trained_with={"value": value})
    big = Recipe(timesteps=(999,), trained_with={"log": "x" * (1 << 20)})
    with pytest.raises(ValueError, match="put less into trained_with"):
        big.to_metadata()
