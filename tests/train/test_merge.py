"""`dmd2 merge`: the merged checkpoint is the model with its LoRA, and says how to sample it."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd2_core import FAMILIES, Recipe, VPSchedule
from train_lora import cli
from train_lora.export import export_lora
from train_lora.merge import merge
from train_lora.models.loading import load_components
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.models.saving import save_single_file

from .tiny_sd15 import random_sd15

RECIPE = Recipe(timesteps=(999, 499), strength=0.5)
UNET = "model.diffusion_model."


def student_of(components, seed=1) -> SharedUNet:
    spec = LoraSpec(rank=2, alpha=3.0)
    student = SharedUNet(copy.deepcopy(components.unet), {STUDENT: spec}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in student.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=generator)
    return student


@pytest.fixture(scope="module")
def files(shared_components, tmp_path_factory):
    """(checkpoint in float32, LoRA in float32 with a recipe)."""
    folder = tmp_path_factory.mktemp("merge")
    save_single_file(shared_components, folder / "base.safetensors", dtype=torch.float32)
    student = student_of(shared_components)
    export_lora(student, STUDENT, folder / "l.safetensors", RECIPE, dtype=torch.float32)
    return folder / "base.safetensors", folder / "l.safetensors"


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_the_merged_network_computes_what_lora_and_base_do(
    kind, shared_components, make_inputs, tmp_path
):
    """SDXL's LoRAs have LDM's names, SD1.5's diffusers'; both find their layers."""
    components = shared_components if kind == "sdxl" else random_sd15()
    student = student_of(components)
    save_single_file(components, tmp_path / "base.safetensors", dtype=torch.float32)
    lora = tmp_path / "l.safetensors"
    export_lora(student, STUDENT, lora, RECIPE, dtype=torch.float32)
    result = merge(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors")
    assert result.num_modules == len(student.modules_with_adapter)
    merged = load_components(tmp_path / "out.safetensors", dtype=torch.float32)
    with torch.no_grad():
        for module, down, up in student.pairs_of(STUDENT):
            before = components.unet.get_submodule(module).weight
            product = (3.0 / 2) * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
            after = merged.unet.get_submodule(module).weight
            torch.testing.assert_close(after, before + product, rtol=1e-6, atol=1e-6)
        if kind == "sdxl":
            x_t, t, condition = make_inputs(2)
            network = SharedUNet(merged.unet, {STUDENT: LoraSpec(rank=1, alpha=1.0)}, seed=0)
            with student.role(STUDENT):
                expected = student(x_t, t, condition)
            found = network(x_t, t, condition)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert (
                network(x_t, t, condition) - components_output(components, x_t, t, condition)
            ).abs().max() > 0.01


def components_output(components, x_t, t, condition):
    network = SharedUNet(
        copy.deepcopy(components.unet), {STUDENT: LoraSpec(rank=1, alpha=1.0)}, seed=0
    )
    return network(x_t, t, condition)


def test_all_else_is_copied_and_the_file_is_the_same_each_time(files, tmp_path):
    base, lora = files
    merge(base, lora, tmp_path / "a.safetensors", strength=0.7)
    merge(base, lora, tmp_path / "b.safetensors", strength=0.7)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    before, after = load_file(base), load_file(tmp_path / "a.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith(UNET)} <= same
    assert UNET + "input_blocks.0.0.weight" in same  # conv_in is no part of a LoRA
    assert UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight" not in same


def test_half_a_strength_is_half_the_change(files, tmp_path):
    base, lora = files
    merge(base, lora, tmp_path / "one.safetensors")
    merge(base, lora, tmp_path / "half.safetensors", strength=0.5)
    zero, half, one = map(
        load_file, (base, tmp_path / "half.safetensors", tmp_path / "one.safetensors")
    )
    for name in zero:
        torch.testing.assert_close(half[name], (zero[name] + one[name]) / 2, rtol=1e-5, atol=1e-6)


def test_the_file_keeps_the_recipe_and_says_what_was_merged(files, tmp_path):
    base, lora = files
    merge(base, lora, tmp_path / "out.safetensors", strength=0.7)
    found = metadata_of(tmp_path / "out.safetensors")
    recipe = Recipe.from_metadata(found)
    assert (recipe.timesteps, recipe.strength) == (RECIPE.timesteps, RECIPE.strength)
    about = json.loads(found["dmd2.merged"])
    assert (about["lora"], about["strength"]) == ("l.safetensors", 0.7)
    assert about["lora_sha256"] == metadata_of(lora)["sshs_model_hash"]
    assert found["modelspec.title"].endswith("with l merged")
    assert "2 steps, CFG 1" in found["modelspec.usage_hint"]
    assert "LoRA" not in found["modelspec.usage_hint"]
    assert found["modelspec.resolution"] == metadata_of(base)["modelspec.resolution"]


def test_a_published_lora_is_named_by_its_family(files, shared_components, tmp_path, capsys):
    base, lora = files
    save_file(load_file(lora), tmp_path / "published.safetensors")
    out = tmp_path / "out.safetensors"
    command = ["merge", str(base), str(tmp_path / "published.safetensors"), "--out", str(out)]
    assert cli.main(command) == 2
    assert "say what it is with --family, one of: DMD2, 4 steps" in capsys.readouterr().err
    assert cli.main([*command, "--family", "SDXL-Lightning, 4 steps"]) == 0
    assert "modules merged at strength 1; sample it with 4 steps" in capsys.readouterr().out
    assert Recipe.from_metadata(metadata_of(out)) == FAMILIES["SDXL-Lightning, 4 steps"]
    assert cli.main([*command[:3], "--out", str(tmp_path / "2.safetensors"), "--family", "X"]) == 2
    assert "family is 'X': choose one of" in capsys.readouterr().err


def test_merging_twice_is_refused(files, tmp_path):
    base, lora = files
    merge(base, lora, tmp_path / "once.safetensors")
    with pytest.raises(ValueError, match="carries a few-step LoRA already"):
        merge(tmp_path / "once.safetensors", lora, tmp_path / "twice.safetensors")
    assert not (tmp_path / "twice.safetensors").exists()


def test_an_existing_file_stays(files, tmp_path):
    base, lora = files
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="which exists"):
        merge(base, lora, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "mine"


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf"), 3.0])
def test_odd_strengths_are_refused(files, tmp_path, strength):
    with pytest.raises(ValueError, match="more than 0 and at most 2"):
        merge(*files, tmp_path / "out.safetensors", strength=strength)


def test_a_lora_for_another_prediction_is_refused(files, shared_components, tmp_path):
    _, lora = files
    model = dataclasses.replace(
        shared_components, prediction="v", schedule=VPSchedule.sdxl().zero_terminal_snr()
    )
    save_single_file(model, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"epsilon prediction, .* v prediction with zero terminal"):
        merge(tmp_path / "v.safetensors", lora, tmp_path / "out.safetensors")


def test_a_lora_for_another_architecture_is_refused(files, tmp_path):
    base, lora = files
    tensors = load_file(lora)
    name = next(name for name in tensors if name.endswith("attn2_to_k.lora_down.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, tmp_path / "wide.safetensors", metadata_of(lora))
    with pytest.raises(ValueError, match=r"another architecture .* 1 of its \d+ modules"):
        merge(base, tmp_path / "wide.safetensors", tmp_path / "out.safetensors")
    save_file(load_file(lora), tmp_path / "no_checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"no SDXL or SD1\.5 checkpoint"):
        merge(tmp_path / "no_checkpoint.safetensors", lora, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_sum_too_large_for_the_type_is_refused(files, shared_components, tmp_path):
    _, lora = files
    save_single_file(shared_components, tmp_path / "half.safetensors")
    tensors = {name: tensor * 1e4 for name, tensor in load_file(lora).items()}
    save_file(tensors, tmp_path / "huge.safetensors", metadata_of(lora))
    with pytest.raises(ValueError, match=r"is not finite in torch\.float16"):
        merge(
            tmp_path / "half.safetensors", tmp_path / "huge.safetensors", tmp_path / "o.safetensors"
        )
    assert not (tmp_path / "o.safetensors").exists()
    assert not list(tmp_path.glob("*.partial"))
