"""A LoRA from full weights: the best approximation of its rank, and what it leaves out."""

from __future__ import annotations

import copy

import pytest
import torch

from dmd2_core import Recipe
from train_lora.export import shared_unet_with_lora, write_lora
from train_lora.extract import extract_lora, low_rank
from train_lora.models.adapters import is_target
from train_lora.models.roles import STUDENT


def test_low_rank_is_eckart_young() -> None:
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    down, up = low_rank(matrix, 7)
    assert (down.shape, up.shape) == ((7, 30), (40, 7))
    singular = torch.linalg.svdvals(matrix)
    error = (matrix - up @ down).norm()
    assert error == pytest.approx(singular[7:].square().sum().sqrt().item(), rel=1e-4)
    torch.testing.assert_close(down.norm(dim=1), singular[:7].sqrt(), rtol=1e-4, atol=0)


def test_the_randomised_decomposition_is_as_good_and_reproducible() -> None:
    """A falling spectrum, as trained changes have; rank 4 of 200 takes the randomised way."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(240, 200, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator))
    singular = 1 / torch.arange(1.0, 201)
    matrix = left * singular @ right.T
    down, up = low_rank(matrix, 4)
    best = singular[4:].square().sum().sqrt().item()
    assert (matrix - up @ down).norm().item() == pytest.approx(best, rel=1e-3)
    assert torch.equal(low_rank(matrix, 4)[0], down)


def changed_by_low_rank(unet, rank: int):
    """A copy whose adapted modules have changed by products of this rank."""
    student, generator = copy.deepcopy(unet), torch.Generator().manual_seed(1)
    for name, weight in student.named_parameters():
        if is_target(name.removesuffix(".weight")) and name.endswith(".weight"):
            flat = weight.data.flatten(1)
            up = torch.randn(len(flat), rank, generator=generator)
            down = torch.randn(rank, flat.shape[1], generator=generator)
            weight.data += 0.02 * (up @ down).reshape(weight.shape)
    return student


def test_a_change_of_low_rank_is_recovered_through_the_file(components, tmp_path, make_inputs):
    base, student = components.unet, changed_by_low_rank(components.unet, rank=2)
    extraction = extract_lora(student.state_dict(), base.state_dict(), rank=4)
    assert len(extraction.modules) == 129
    assert extraction.kept == pytest.approx(1, abs=1e-6)
    recipe = Recipe(timesteps=(999,))
    write_lora(
        extraction.modules, base.config, tmp_path / "l.safetensors", recipe, dtype=torch.float32
    )
    x_t, t, condition = make_inputs()
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    with torch.no_grad():
        expected = student(x_t, t, condition.hidden, added_cond_kwargs=added).sample
        shared, recipe = shared_unet_with_lora(base, tmp_path / "l.safetensors")
        with shared.role(STUDENT):
            found = shared(x_t, t, condition)
    assert (recipe.lora_rank, recipe.lora_alpha) == (4, 4.0)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_what_has_no_place_in_a_lora_is_counted(components):
    base = components.unet.state_dict()
    student = {name: weight.clone() for name, weight in base.items()}
    student["conv_out.bias"][0] += 3.0  # squared 9
    weight = student["mid_block.attentions.0.proj_in.weight"]
    weight[0, 0] += 1.0  # rank 1, squared 1
    extraction = extract_lora(student, base, rank=1)
    assert extraction.kept == pytest.approx(1 / 10, rel=1e-4)
    assert extract_lora(base, base, rank=1).kept == 1
