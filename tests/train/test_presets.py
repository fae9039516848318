"""The presets: what they say and that they resolve; test_every_option.py trains each of them."""

from __future__ import annotations

import re
import tomllib

import pytest

from train_lora import cli
from train_lora.config import Config
from train_lora.config_effects import value_of
from train_lora.config_load import PRESETS, UNKNOWN, load, load_unfinished, presets
from train_lora.sampling import step_plan

PATHS = {
    "model.path": "model.safetensors",
    "data.prompts": "prompts.txt",
    "data.real_images": "photos",
    "output.directory": "run",
}
MORE = {
    "sdxl-1step": {"regression.pairs": "pairs"},
    "sd15-1step-stage2": {"training.continue_from": "first"},
}
OTHERS = ("demo", "imagenet64")  # of the second kind: test_imagenet_presets.py
NAMES = [p.stem for p in sorted(PRESETS.glob("*.toml")) if not p.stem.startswith(OTHERS)]
ONE_GPU = ["sdxl-4step-24gb", "sdxl-4step-16gb", "sdxl-4step-12gb"]
SD15 = ["sd15-1step-stage1", "sd15-1step-stage2"]


def resolved(name: str, **overrides: object) -> Config:
    """The preset with the paths that it leaves open, and `section__key=value`."""
    paths = PATHS | MORE.get(name, {})
    if name == "sd15-1step-stage1":  # no GAN
        del paths["data.real_images"]
    given = paths | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return load(preset=name, overrides=list(given.items())).config


def test_these_are_the_presets() -> None:
    assert set(NAMES) == {"sdxl-4step", *ONE_GPU, "sdxl-1step", *SD15}


@pytest.mark.parametrize("name", NAMES)
def test_each_resolves_given_paths_and_says_what_it_is_for_and_needs(name: str) -> None:
    config = resolved(name)
    text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    purpose, needs = text.splitlines()[:2]
    assert purpose.startswith("# SD")
    assert purpose.endswith(".")
    more = " and output.directory" if name == "sd15-1step-stage1" else ", data.real_images"
    assert needs.startswith(f"# Needs model.path, data.prompts{more}")
    for section, keys in tomllib.loads(text).items():  # nothing of it is overruled
        for key, value in keys.items():
            if value != UNKNOWN:
                assert value_of(config, f"{section}.{key}") == value


def test_the_figures_are_the_papers() -> None:
    """Settings of the paper's table, as docs and comments promise."""
    four, one = resolved("sdxl-4step"), resolved("sdxl-1step")
    for config in (four, one):
        training = config.training
        assert 8 * training.batch_size * training.gradient_accumulation_steps == 128
        assert config.distribution_matching.guidance == 8
        assert config.critic.updates_per_generator == 5
        assert (config.gan.generator_weight, config.gan.critic_weight) == (5e-3, 1e-2)
        assert (config.student.rank, config.student.alpha) == (64, 8)
        assert config.student.learning_rate == config.critic.learning_rate == 5e-5
    assert (four.training.iterations, one.training.iterations) == (16_000, 3_000 + 25_000)
    assert one.regression.warmup_iterations == 3_000
    assert one.regression.num_pairs == 10_000
    assert step_plan(four).timesteps == (999, 749, 499, 249)
    first, second = (resolved(name) for name in SD15)
    for config in (one, first, second):
        assert step_plan(config).timesteps == (999,)
        assert config.sampling.conditioning_timestep == 399
    for config in (first, second):
        assert config.distribution_matching.guidance == 1.75
        assert config.critic.updates_per_generator == 10
        assert config.data.resolution_px == 512
        assert config.student.learning_rate == config.critic.learning_rate
    assert (first.gan.enabled, second.gan.enabled) == (False, True)
    assert (first.training.iterations, second.training.iterations) == (40_000, 5_000)
    assert first.student.learning_rate == pytest.approx(20 * second.student.learning_rate)
    assert (second.gan.generator_weight, second.gan.critic_weight) == (1e-3, 1e-2)


def test_the_second_stage_does_not_start_without_a_first_one() -> None:
    with pytest.raises(ValueError, match=r"training\.continue_from is not set; add continue_from"):
        load(preset="sd15-1step-stage2", overrides=list(PATHS.items()))
    unfinished = load_unfinished(preset="sd15-1step-stage2", overrides=list(PATHS.items()))
    assert unfinished.missing == {"training.continue_from"}
    assert (
        resolved("sd15-1step-stage2", training__continue_from="none").training.continue_from is None
    )


@pytest.mark.parametrize("name", SD15)
def test_four_steps_of_sd15_are_two_options(name: str) -> None:
    config = resolved(name, sampling__steps=4, sampling__conditioning_timestep="none")
    assert step_plan(config).timesteps == (999, 749, 499, 249)
    assert step_plan(config).conditioning_timestep is None


def test_those_for_one_gpu_learn_the_same_in_other_pieces() -> None:
    configs = [resolved(name).to_dict() for name in ONE_GPU]
    pieces = [config.pop("training") for config in configs]
    assert configs[0] == configs[1] == configs[2]
    assert {p["batch_size"] * p["gradient_accumulation_steps"] for p in pieces} == {8}
    assert [p["optimizer"] for p in pieces] == ["adamw", "adamw", "adamw8bit"]
    assert all(p["gradient_checkpointing"] for p in pieces)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert any(re.match(r"sdxl-4step-12gb +SDXL in 4 steps on one GPU of 12 GB", x) for x in lines)
    assert len({re.search(r" {2,}", line).end() for line in lines}) == 1  # in a column
