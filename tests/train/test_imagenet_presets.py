"""The presets of ImageNet-64: what they say and that they resolve; test_every_option.py trains
them."""

from __future__ import annotations

import tomllib

import pytest

from train_lora.config import Config
from train_lora.config_effects import value_of
from train_lora.config_load import PRESETS, UNKNOWN, load
from train_lora.sampling import step_plan

SHORT, FIRST, SECOND = "imagenet64", "imagenet64-long-stage1", "imagenet64-long-stage2"
NEEDED = {
    SHORT: ("model.path", "data.real_images", "output.directory"),
    FIRST: ("model.path", "output.directory"),
    SECOND: ("model.path", "data.real_images", "output.directory", "training.continue_from"),
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
            if value != UNKNOWN:
                assert value_of(config, f"{section}.{key}") == value


def test_the_figures_are_the_papers() -> None:
    short, first, second = (resolved(name) for name in NEEDED)
    for config, rate in ((short, 2e-6), (first, 2e-6), (second, 5e-7)):
        assert 7 * config.training.batch_size == 280
        assert config.student.learning_rate == config.critic.learning_rate == rate
        assert config.critic.updates_per_generator == 5
        assert config.distribution_matching.guidance == 1
        assert step_plan(config).timesteps == (999,)
        assert config.sampling.conditioning_timestep is None
    iterations = [config.training.iterations for config in (short, first, second)]
    assert iterations == [200_000, 400_000, 150_000]
    for config in (short, second):
        assert (config.gan.generator_weight, config.gan.critic_weight) == (3e-3, 1e-2)
    assert not first.gan.enabled
