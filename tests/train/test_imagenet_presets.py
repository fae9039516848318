"""The presets of ImageNet-64: what they say and that they resolve; test_every_option.py trains
them."""

from __future__ import annotations

import tomllib

import pytest

from train_lora.config import Config
from train_lora.config_load import PRESETS, load, value_of
from train_lora.sampling import step_plan

SHORT, FIRST = "imagenet64", "imagenet64-long-stage1"
NEEDED = {
    SHORT: ("model.path", "data.real_images", "output.directory"),
    FIRST: ("model.path", "output.directory"),
}


def resolved(name: str) -> Config:
    return load(preset=name, overrides=[(key, "somewhere") for key in NEEDED[name]]).config


def test_these_are_the_presets() -> None:
    assert {path.stem for path in PRESETS.glob("imagenet64*.toml")} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_each_resolves_given_what_it_says_it_needs(name: str) -> None:
    config = resolved(name)
    text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    purpose, _, needs = text.partition("\n")
    assert purpose.startswith("# ImageNet-64 in 1 step")
    assert purpose.endswith(".")
    needs = needs.partition("#\n")[0]
    assert needs.startswith("# Needs ")
    assert all(key in needs for key in NEEDED[name])
    for section, keys in tomllib.loads(text).items():  # nothing of it is overruled
        for key, value in keys.items():
            assert value_of(config, f"{section}.{key}") == value


def test_the_figures_are_the_papers() -> None:
    short, first = resolved(SHORT), resolved(FIRST)
    for config in (short, first):
        assert 7 * config.training.batch_size == 280
        assert config.student.learning_rate == config.critic.learning_rate == 2e-6
        assert config.critic.updates_per_generator == 5
        assert config.distribution_matching.guidance == 1
        assert step_plan(config).timesteps == (999,)
        assert config.sampling.conditioning_timestep is None
    assert (short.training.iterations, first.training.iterations) == (200_000, 400_000)
    assert (short.gan.generator_weight, short.gan.critic_weight) == (3e-3, 1e-2)
    assert not first.gan.enabled
