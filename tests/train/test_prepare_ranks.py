"""`dmd2 prepare` in two processes: shared work, the same cache as from one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.train.launching import finish
from train_lora.cli import main
from train_lora.models.safetensors_io import read_safetensors

from .picture_files import captioned_folder


def prepare(tmp_path: Path, cache: str, num_processes: int) -> Path:
    folder = tmp_path / cache
    command = ["prepare", "--preset", "demo", "--data.cache", str(folder)]
    command += ["--data.prompts", str(tmp_path / "prompts.txt")]
    command += ["--data.real_images", str(tmp_path / "photos")]
    printed = finish(main, command, processes=num_processes)
    # Twice would mean two processes that each think they are alone.
    assert printed.count("pictures: ") == printed.count("report.json") == 1
    return folder


def test_two_processes_share_the_work_and_give_the_cache_of_one(tmp_path: Path) -> None:
    captioned_folder(tmp_path / "photos", [(128, 128)] * 65 + [(320, 192)] * 5)  # two units
    (tmp_path / "photos" / "066.txt").unlink()
    lines = [f"a scene number {number}" for number in range(5)]  # one unit, three in all
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    one, two = prepare(tmp_path, "one", 1), prepare(tmp_path, "two", 2)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    for name in names:
        if name.endswith(".json"):
            a, b = (json.loads((folder / name).read_text()) for folder in (one, two))
            assert a == b
            continue
        (tensors, metadata), (others, other_metadata) = (
            read_safetensors(folder / name) for folder in (one, two)
        )
        assert metadata == other_metadata
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), key
