"""The presets: what they say and that they resolve; test_every_option.py trains each of them."""

from __future__ import annotations

import tomllib

import pytest

from train_lora import cli
from train_lora.config import Config
from train_lora.config_load import PRESETS, load, presets, value_of
from train_lora.sampling import step_plan

PATHS = {
    "model.path": "model.safetensors",
    "data.prompts": "prompts.txt",
    "data.real_images": "photos",
    "output.directory": "run",
}
OTHERS = ("demo", "imagenet64")  # of the second kind: test_imagenet_presets.py
NAMES = [p.stem for p in sorted(PRESETS.glob("*.toml")) if not p.stem.startswith(OTHERS)]
ONE_GPU = ["sdxl-4step-24gb", "sdxl-4step-16gb", "sdxl-4step-12gb"]


def resolved(name: str, **overrides: object) -> Config:
    """The preset with the four paths that it leaves open, and `section__key=value`."""
    pairs = {"regression.pairs": "pairs"} if name == "sdxl-1step" else {}
    given = PATHS | pairs | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return load(preset=name, overrides=list(given.items())).config


def test_these_are_the_presets() -> None:
    assert set(NAMES) == {"sdxl-4step", *ONE_GPU, "sdxl-1step", "sd15-1step"}


@pytest.mark.parametrize("name", NAMES)
def test_each_resolves_given_paths_and_says_what_it_is_for_and_needs(name: str) -> None:
    config = resolved(name)
    text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    purpose, needs = text.splitlines()[:2]
    assert purpose.startswith("# SD")
    assert purpose.endswith(".")
    assert needs.startswith("# Needs model.path, data.prompts, data.real_images")
    for section, keys in tomllib.loads(text).items():  # nothing of it is overruled
        for key, value in keys.items():
            assert value_of(config, f"{section}.{key}") == value


def test_the_figures_are_the_papers() -> None:
    """Settings of the paper's table, as docs and comments promise."""
    four, one, small = resolved("sdxl-4step"), resolved("sdxl-1step"), resolved("sd15-1step")
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
    for config in (one, small):
        assert step_plan(config).timesteps == (999,)
        assert config.sampling.conditioning_timestep == 399
    assert small.distribution_matching.guidance == 1.75
    assert small.critic.updates_per_generator == 10
    assert (small.gan.generator_weight, small.gan.critic_weight) == (1e-3, 1e-2)
    assert small.data.resolution_px == 512


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
    assert "sdxl-4step-12gb   SDXL in 4 steps on one GPU of 12 GB" in "\n".join(lines)
