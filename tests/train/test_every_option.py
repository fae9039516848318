"""The trainings of recipes.py in one process and in two: the same updates, and what they leave."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.train import recipes
from tests.train.launching import finish
from tests.train.recipes import RECIPES, Recipe
from train_lora.config_load import PRESETS
from train_lora.export import read_lora
from train_lora.models.loading import load_components

RUNS = ("alone", "pair")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo, as in test_processes.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = recipes.write_inputs(tmp_path_factory.mktemp("inputs") / "all")
    if find_spec("datasets") and find_spec("pyarrow"):
        recipes.write_tables(folder)
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One recipe in one process and in two."""

    recipe: Recipe
    alone: Path
    pair: Path
    cache_reports: list[str]


@pytest.fixture(scope="module", params=RECIPES)
def trained(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    recipe = RECIPES[request.param]
    for library in recipe.needs:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    folder = tmp_path_factory.mktemp("runs")
    reports = []
    for number, name in enumerate(RUNS, 1):
        argv = recipes.command(recipe, inputs, folder / name, alone=number == 1)
        if recipe.prepares:
            finish(recipes.run, ["prepare", *argv[1:]], inputs, processes=number)
            reports.append((folder / f"{name}_cache" / "report.json").read_text())
        finish(recipes.run, argv, inputs, processes=number, environment=recipe.environment)
    return Trained(
        recipe=recipe, alone=folder / "alone", pair=folder / "pair", cache_reports=reports
    )


def checkpoint(run: Path, name: str) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / "000001" / f"{name}.safetensors")


def test_two_processes_make_the_update_of_one(trained: Trained) -> None:
    """After one update Adam's mean is a tenth of the gradient."""
    runs = (trained.alone, trained.pair)
    for run in runs:
        state = json.loads((run / "checkpoints" / "000001" / "state.json").read_text())
        batch = trained.recipe.settings.get("training.batch_size", 2)
        assert state["matches"]["global batch"] == 2 * batch
    for role in ("student", "critic"):
        one, two = (checkpoint(run, f"{role}_optimizer") for run in runs)
        assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
            n: (t.shape, t.dtype) for n, t in two.items()
        }
        names = [name for name in one if name.endswith((".exp_avg", ".state1"))]
        in_floats = [name for name in names if one[name].dtype == torch.float32]
        a, b = (torch.cat([part[n].flatten() for n in in_floats]) for part in (one, two))
        assert a.norm() > 0
        assert (a - b).norm() < trained.recipe.tolerance * a.norm(), role
        for name in set(names) - set(in_floats):  # in 8 bits: a rounding may go the other way
            assert (one[name] != two[name]).float().mean() < 0.01


def test_they_leave_the_same_student_with_the_recipe(trained: Trained, inputs: Path) -> None:
    recipe, found = trained.recipe, {}
    of_classes = recipe.preset.startswith("imagenet64")
    for run in (trained.alone, trained.pair):
        lora, whole = run / "lora.safetensors", run / "student.safetensors"
        assert lora.is_file() != of_classes
        assert whole.is_file() == (of_classes or recipe.settings.get("student.kind") == "full")
        if of_classes:
            told = load_components(whole).recipe
        else:
            modules, told = read_lora(lora)
            assert any(module.up.abs().max() > 0 for module in modules.values())
        assert told is not None
        assert told.prediction == recipe.prediction
        assert told.zero_terminal_snr == (recipe.prediction == "v")
        assert told.timesteps == tuple(recipe.timesteps)
        assert told.conditioning_timestep == recipe.conditioning_timestep
        with safe_open(whole if of_classes else lora, "pt") as file:
            pictured = "modelspec.thumbnail" in file.metadata()
            names = set(file.keys())
        assert pictured == (recipe.settings.get("export.thumbnail") != "false")
        diffusers = all(name.startswith("unet.") for name in names)
        assert diffusers == (recipe.settings.get("export.names") == "diffusers")
        found[run] = names
        if whole.is_file():
            assert load_components(whole).kind == ("edm" if of_classes else "sd15")
    assert found[trained.alone] == found[trained.pair]


def test_records_and_pictures_are_those_that_were_asked_for(trained: Trained) -> None:
    settings = trained.recipe.settings
    trackers = settings.get("logging.trackers", '["tensorboard"]')
    for run in (trained.alone, trained.pair):
        assert (len(list(run.glob("logs/events.*"))) == 1) == ("tensorboard" in trackers)
        assert (len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1) == ("wandb" in trackers)
        for folder in ("samples", "panels"):
            pictures = [path.name for path in run.glob(f"{folder}/*")]
            assert pictures == (["000001.png"] if "validation.every" in settings else [])
    if "validation.every" in settings:
        one, two = (
            json.loads((run / "validation.jsonl").read_text())["figures"]
            for run in (trained.alone, trained.pair)
        )
        assert one == pytest.approx(two, rel=0.05, abs=0.01)  # after an update of Adam's
        assert json.loads((trained.pair / "best.json").read_text())["iteration"] == 1


def test_prepared_caches_are_the_same(trained: Trained) -> None:
    if not trained.recipe.prepares:
        assert trained.cache_reports == []
        return
    one, two = map(json.loads, trained.cache_reports)
    assert one["buckets"] == two["buckets"] == {"128x128": 4, "160x96": 4}
    assert one["num_left_out"] == two["num_left_out"] == {"too small": 1}


def test_every_preset_is_trained() -> None:
    names = {path.stem for path in PRESETS.glob("*.toml")}
    assert {recipe.preset for recipe in RECIPES.values()} == names - {"demo"}
