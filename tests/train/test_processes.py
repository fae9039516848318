"""Runs as processes of their own: killed and resumed, alone and in pairs (torchrun, gloo)."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from train_lora import cli
from train_lora.checkpoint_store import newest_complete

from .launching import (
    ALONE,
    LAUNCHER,
    PAIR,
    PATIENCE_SECONDS,
    finish,
    started,
    wait_for,
    workers_of,
)

ITERATIONS = 8

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of `dmd2 train`, for a small run with data of its own; without output folder and batch."""
    data, pictures = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("pictures")
    colours = ("red", "green", "blue", "purple", "gray")
    (data / "prompts.txt").write_text(
        "".join(f"a {c} ring on a plain background\n" for c in colours)
    )
    for number, colour in enumerate(colours[:4]):
        Image.new("RGB", (128, 128), colour).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a plain {colour} background")
    settings = {
        "data.prompts": data / "prompts.txt",
        "data.real_images": pictures,
        "training.iterations": ITERATIONS,
        "critic.updates_per_generator": 2,
        "student.rank": 4,
        "critic.rank": 4,
        "validation.every": 0,
        "checkpoint.every": 2,
        "checkpoint.keep_every": 2,
    }
    return ["train", "--preset", "demo", *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """One process, batches of 4, never stopped."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finish([*ALONE, *arguments, "--batch_size=4", f"--output.directory={run}"])
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """Two processes, batches of 2 in each, never stopped."""
    run = tmp_path_factory.mktemp("pair") / "run"
    finish([*PAIR, *arguments, "--batch_size=2", f"--output.directory={run}"])
    return run


def state(run: Path, iteration: int) -> dict[str, dict[str, object]]:
    return json.loads((run / "checkpoints" / f"{iteration:06d}" / "state.json").read_text())


def tensors(run: Path, iteration: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{iteration:06d}" / f"{name}.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], ending: str) -> float:
    """Norm of the difference relative to the norm, over all tensors whose names end so."""
    a, b = (
        torch.cat([t.flatten() for n, t in sorted(part.items()) if n.endswith(ending)])
        for part in (one, other)
    )
    assert a.norm() > 0
    return float((a - b).norm() / a.norm())


def test_two_processes_with_half_the_batch_make_the_same_update(alone: Path, pair: Path) -> None:
    assert state(pair, 2)["matches"]["global batch"] == 4
    assert state(pair, 2)["config"]["training"]["batch_size"] == 2
    # After one update, Adam's mean is a tenth of the gradient that the student was given; data and
    # noise are the same bit for bit, only the order of float32 sums differs.
    one, two = (tensors(run, 2, "student_optimizer") for run in (alone, pair))
    assert difference(one, two, ".exp_avg") < 1e-5
    # Adam's first steps are nearly lr * sign(gradient): where a gradient is about 0, the last bits
    # decide the sign, so that later weights agree less well.
    for name in ("student", "critic"):
        one, two = (tensors(run, ITERATIONS, name) for run in (alone, pair))
        assert difference(one, two, "lora_B.weight") < 5e-2, name


def test_a_killed_process_goes_on_to_the_same_file(
    alone: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started([*ALONE, *arguments, "--batch_size=4", f"--output.directory={run}"]) as process:
        wait_for(run / "checkpoints" / "000002", process)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
    assert not (run / "lora.safetensors").exists()
    finish([*ALONE, "train", "--resume", str(run)])
    assert (run / "lora.safetensors").read_bytes() == (alone / "lora.safetensors").read_bytes()


def test_two_processes_stopped_killed_and_resumed_make_the_same_file(
    pair: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    resume = [*PAIR, "train", "--resume", str(run)]
    with started([*PAIR, *arguments, "--batch_size=2", f"--output.directory={run}"]) as process:
        wait_for(run / "checkpoints" / "000002", process)
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode != 0
        assert "dmd2: stopped by SIGTERM after iteration" in errors
        assert errors.count("and saved; go on with: dmd2 train --resume") == 1
    saved = int(newest_complete(run).name)
    assert saved < ITERATIONS - 2

    with started(resume) as process:  # a rank dies
        wait_for(run / "checkpoints" / f"{saved // 2 * 2 + 2:06d}", process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode != 0
        assert "dmd2: error: Process 0 lost the other processes of this run" in errors
        assert "SIGKILL" in errors or "-9" in errors  # torchrun names the one that died
    assert not (run / "lora.safetensors").exists()

    finish(resume)
    assert (run / "lora.safetensors").read_bytes() == (pair / "lora.safetensors").read_bytes()


def test_export_of_the_last_checkpoint_is_the_runs_own_file(alone: Path, tmp_path: Path) -> None:
    """From the run's folder, and, for an earlier one, from the checkpoint's: other weights."""
    out = tmp_path / "last.safetensors"
    finish([*ALONE, "export", str(alone), "--out", str(out)])
    assert out.read_bytes() == (alone / "lora.safetensors").read_bytes()
    early = tmp_path / "early.safetensors"
    checkpoint = alone / "checkpoints" / "000002"
    finish([*ALONE, "export", str(checkpoint), "--out", str(early)])
    ours, theirs = load_file(out), load_file(early)
    assert set(ours) == set(theirs)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--resume", "{alone}"], "is complete: {alone}/lora.safetensors"),
        (["train", "--resume", "{alone}", "--student.rank=8"], "student.rank is 8, but the run in"),
        (["train", "--resume", "{alone}", "--preset", "demo"], "takes the run's own config.toml"),
        (["train", "--resume", "{alone}", "--directory=x"], "remove --output.directory"),
        (["train", "--resume", "absent"], "absent holds no run to resume"),
        (["train", "--preset", "demo", "--directory={alone}"], "dmd2 train --resume {alone}"),
        (["export", "absent", "--out", "x.safetensors"], "absent is no folder"),
        (["export", "{alone}", "--out", "x.ckpt"], "ends in .safetensors"),
        (["export", "{alone}", "--out", "{alone}/lora.safetensors"], "which exists"),
    ],
)
def test_mistakes_with_runs_end_as_one_sentence(
    alone: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    before = sorted(alone.rglob("*"))
    assert cli.main([word.format(alone=alone) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("dmd2: error: ")
    assert message.format(alone=alone) in captured.err
    assert sorted(alone.rglob("*")) == before


def test_processes_share_the_step_differ_in_noise_and_skip_together(tmp_path: Path) -> None:
    finish([*LAUNCHER, "-m", "tests.train.agreement_worker", str(tmp_path)])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == 2
    assert first["steps"] == second["steps"]
    assert set(first["steps"]) == {0, 1, 2, 3}
    assert len({*first["noise"], *second["noise"]}) == 4
    for result in (first, second):  # in the second process alone something was not finite
        assert result["skipped_bad_gradient"] == 1
        assert result["critic_unchanged"]
        assert result["student_skipped"] == 0
        assert result["skipped_bad_loss"] == 2
        assert result["critic_moved"]
    assert first["weights"] == second["weights"]
