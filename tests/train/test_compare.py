"""`dmd2 compare`: several systems on the same prompts and noise."""

from __future__ import annotations

import json

import torch
from PIL import Image

from dmd2_core import Recipe
from train_lora import cli, render
from train_lora.compare import Student, _labels
from train_lora.metrics.picture_folder import pixels, read_folder
from train_lora.pictures import GAP_PX, LABEL_PX

from .tiny import student_file


def test_comparison_puts_every_system_on_the_same_noise(
    tmp_path, tiny_teacher, monkeypatch
) -> None:
    calls = []
    sample = render.sample_latents

    def spy(unet, role, components, condition, plan, **options):
        calls.append((role, plan.timesteps, options["seed"], options["strength"]))
        return sample(unet, role, components, condition, plan, **options)

    monkeypatch.setattr(render, "sample_latents", spy)
    lora = str(student_file(tmp_path / "ours.safetensors"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na blue ring\n")
    out = tmp_path / "out"
    argv = ["compare", "--model", "demo", "--prompts", str(prompts), "--guidance", "5"]
    argv += ["--steps", "2", "--lora", lora, "--other", "SDXL-Lightning, 2 steps", lora]
    argv += ["--size-px", "64", "--seed", "3", "--out", str(out)]
    assert cli.main(argv) == 0
    assert calls == [
        ("teacher", (999, 499), 3, 0.0),
        ("student", (999, 749, 499, 249), 3, 1.0),
        ("student", (999, 499), 3, 0.0),
    ]
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "teacher, 2 steps, guidance 5",
        "ours",
        "ours (SDXL-Lightning, 2 steps)",
    ]
    figures = json.loads((out / "lora_1" / "metrics.json").read_text())["figures"]
    assert lines[3].split("|")[2].strip() == f"{figures['brightness']:.4g}"
    with Image.open(out / "grid.png") as grid:
        row = LABEL_PX + 64 + GAP_PX
        assert grid.size[1] > 3 * row  # a row for each system, below the prompts
        top = grid.size[1] - row + LABEL_PX  # of the last system's row
        cell = grid.crop((2 * GAP_PX + 64, top, 2 * GAP_PX + 128, top + 64))
    assert torch.equal(pixels(cell), pixels(read_folder(out / "lora_2", "x").open(1)))
    assert cli.main(argv) == 0
    assert len(calls) == 3  # nothing is drawn twice


def test_loras_of_equal_names_keep_rows_of_their_own() -> None:
    """Every run calls its LoRA lora.safetensors."""
    paths = ["a/lora.safetensors", "b/lora.safetensors", "x.safetensors"]
    labels = _labels([Student(lora=path) for path in paths])
    assert labels == ["a/lora", "b/lora", "x"]
    labels = _labels([Student(lora=path) for path in ["1/a/l", "2/a/l"]])
    assert labels == ["1: a/l", "2: a/l"]


def test_a_lora_is_compared_in_several_numbers_of_steps(
    tmp_path, tiny_teacher, monkeypatch, caplog
) -> None:
    calls = []
    sample = render.sample_latents

    def spy(unet, role, components, condition, plan, **options):
        calls.append((role, plan.timesteps))
        return sample(unet, role, components, condition, plan, **options)

    monkeypatch.setattr(render, "sample_latents", spy)
    recipe = Recipe(timesteps=(999, 499), trained_steps=(2, 3))
    lora = str(student_file(tmp_path / "ours.safetensors", recipe))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n")
    out = tmp_path / "out"
    argv = ["compare", "--model", "demo", "--prompts", str(prompts), "--guidance", "1"]
    argv += ["--steps", "1", "--lora", lora, "--size-px", "64", "--out", str(out)]
    assert cli.main([*argv, "--lora-steps", "3", "--lora-steps", "4"]) == 0
    assert calls == [
        ("teacher", (999,)),
        ("student", (999, 666, 333)),
        ("student", (999, 749, 499, 249)),
    ]
    said = [row.getMessage() for row in caplog.records if row.name == "train_lora.render"]
    assert said == [f"--lora {lora!r} was trained for 2 to 3 steps, and draws in 4 steps"]
    names = [line.split("|")[1].strip() for line in (out / "table.md").read_text().splitlines()]
    assert names[2:] == ["teacher, 1 step, guidance 1", "ours, 3 steps", "ours, 4 steps"]
