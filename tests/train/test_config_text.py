"""A configuration as text: TOML and JSON that read back, what is shown, what a recipe tells."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest

from train_lora import config_text
from train_lora.config import SECTIONS
from train_lora.config_effects import ineffective_keys, value_of
from train_lora.config_load import ABLATIONS, TYPES, from_dict, load, load_unfinished, read_toml

CONFIGS = {
    "demo": lambda: load(preset="demo"),
    "all ablated": lambda: load(
        preset="demo", ablations=[n for n in ABLATIONS if n != "no-distribution-matching"]
    ),
    "awkward texts": lambda: load(
        preset="demo",
        overrides=[
            ("directory", 'C:\\out "x"\t\x7f\u2028é😀'),
            ("validation.prompts", '["a, b", "#c"]'),
            ("timesteps", "999"),
            ("conditioning-timestep", "399"),
        ],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dict_and_json_round_trip(name):
    config = CONFIGS[name]().config
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_toml_round_trip_for_all_that_has_effect(name, tmp_path):
    config = CONFIGS[name]().config
    path = tmp_path / "config.toml"
    path.write_text(config_text.to_toml(config), encoding="utf-8")
    again = load(file=path).config
    idle = ineffective_keys(config)
    assert set(read_toml(path)) == set(TYPES) - set(idle)
    for key in set(TYPES) - set(idle):
        assert value_of(again, key) == value_of(config, key)


def test_show_tells_each_origin():
    text = config_text.show(load(preset="demo", overrides=[("student.rank", "8")]))
    assert "rank = 8                                  # cli\n" in text
    assert "enabled = true                            # default\n" in text
    assert text.count("# ") == len(TYPES)


def test_show_lists_what_must_still_be_set_and_checks_the_rest():
    paths = {"model.path", "data.prompts", "output.directory"}
    unfinished = load_unfinished(preset="sdxl-4step", overrides=[("stream", "true")])
    assert unfinished.missing == paths | {"data.real_images"}
    text = config_text.show(unfinished)
    assert text.count("  # required\n") == 4
    assert "[model]\n# path = ...                              # required\n" in text
    shown = tomllib.loads(text)
    assert {f"{s}.{name}" for s in shown for name in shown[s]} == set(TYPES) - unfinished.missing
    assert load_unfinished(preset="sdxl-4step", ablations=["no-gan"]).missing == paths
    assert load_unfinished(preset="demo") == load(preset="demo")
    with pytest.raises(ValueError, match=r"student\.rank is 0"):
        load_unfinished(preset="sdxl-4step", overrides=[("student.rank", "0")])


def test_every_key_is_documented_and_listed():
    reference = config_text.key_reference()
    for section, kind in SECTIONS.items():
        documents = config_text.field_documents(kind)
        for item in dataclasses.fields(kind):
            assert documents.get(item.name, "").endswith("."), f"{section}.{item.name}"
            assert f"  --{section}.{item.name}\n" in reference


def test_a_recipe_is_the_same_after_a_run_was_resumed(tmp_path):
    """From its config.toml, which does not hold what had no effect."""
    from train_lora.finish import recipe_of

    from .tiny import random_components

    for ablation in ("no-gan", "no-distribution-matching"):
        config = load(preset="demo", overrides=[("student.kind", "full")], ablations=[ablation])
        (tmp_path / "config.toml").write_text(config_text.to_toml(config.config))
        again = load(file=tmp_path / "config.toml").config
        recipes = [recipe_of(c, random_components(), 5) for c in (config.config, again)]
        assert recipes[0] == recipes[1]
        assert "alpha" not in recipes[0].trained_with["student"]


def test_recipe_settings_do_not_depend_on_folders():
    here = load(preset="demo", overrides=[("model.path", "/a/base"), ("directory", "x")]).config
    there = load(preset="demo", overrides=[("model.path", "b/base"), ("directory", "y")]).config
    assert here.recipe_settings() == there.recipe_settings()
    assert here.recipe_settings()["model"]["path"] == "base"
    results = {"output", "validation", "logging", "checkpoint", "export"}
    assert set(here.recipe_settings()) == set(SECTIONS) - results
