"""Runs as processes of their own: killed and resumed, alone and in pairs (torchrun, gloo)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.train import agreement_worker
from tests.train.launching import TORCHRUN, TWO_PROCESSES, finish, launched
from train_lora.checkpoint_store import newest_complete
from train_lora.cli import main

ITERATIONS = 8
GO_ON = "and saved; go on with: dmd2 train --resume"

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
    finish(main, [*arguments, "--batch_size=4", f"--output.directory={run}"])
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """Two processes, batches of 2 in each, never stopped."""
    run = tmp_path_factory.mktemp("pair") / "run"
    finish(main, [*arguments, "--batch_size=2", f"--output.directory={run}"], processes=2)
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
    argv = [*arguments, "--batch_size=4", f"--output.directory={run}"]
    with launched(main, argv) as launch:
        launch.wait_for(run / "checkpoints" / "000002")
        launch.processes[0].kill()
        assert launch.wait() == [-signal.SIGKILL]
    assert not (run / "lora.safetensors").exists()
    finish(main, ["train", "--resume", str(run)])
    assert (run / "lora.safetensors").read_bytes() == (alone / "lora.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pair`, by torchrun, which got SIGTERM after iteration 2 and passed it on."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    command = ["-m", "train_lora.cli", *arguments, "--batch_size=2", f"--output.directory={run}"]
    with launched(TORCHRUN, [*TWO_PROCESSES, *command]) as launch:
        launch.wait_for(run / "checkpoints" / "000002")
        launch.processes[0].terminate()
        assert launch.wait() != [0]
        errors = launch.printed("err")
    assert "dmd2: stopped by SIGTERM after iteration" in errors
    assert errors.count(GO_ON) == 1
    return run


def test_two_processes_stopped_killed_and_resumed_make_the_same_file(
    pair: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    argv = ["train", "--resume", str(run)]
    with launched(main, argv, processes=2) as launch:  # Ctrl-C goes to both
        launch.wait_for(run / "checkpoints" / following(run))
        for process in launch.processes:
            os.kill(process.pid, signal.SIGINT)
        assert launch.wait() == [128 + signal.SIGINT] * 2
        assert launch.printed("err").count(GO_ON) == 1

    with launched(main, argv, processes=2) as launch:  # a rank dies
        launch.wait_for(run / "checkpoints" / following(run))
        launch.processes[1].kill()
        assert launch.wait() == [2, -signal.SIGKILL]
        errors = launch.printed("err")
        assert "dmd2: error: Process 0 lost the other processes of this run" in errors
        assert "Traceback" not in errors
    assert not (run / "lora.safetensors").exists()

    finish(main, argv, processes=2)
    assert (run / "lora.safetensors").read_bytes() == (pair / "lora.safetensors").read_bytes()


def following(run: Path) -> str:
    """The name of the first checkpoint that a resumed run will make by itself."""
    saved = int(newest_complete(run).name)
    assert saved < ITERATIONS - 2
    return f"{saved // 2 * 2 + 2:06d}"


def test_without_room_to_save_two_processes_end_and_lose_nothing(
    pair: Path, stopped: Path, tmp_path: Path
) -> None:
    """The system refuses a long file to the first; the second is told. Then a bit of the newest
    checkpoint is flipped, and there is the beginning of another: both go on from the one before."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    before = newest_complete(run)
    argv = ["train", "--resume", str(run)]
    with launched(agreement_worker.without_room, argv, processes=2) as launch:
        assert launch.wait() == [2, 2]
        errors = launch.printed("err")
    wanted = f"dmd2: error: The checkpoint of iteration {int(following(run))} cannot be saved in"
    assert wanted in errors
    assert "(File too large); earlier ones are untouched" in errors
    assert f"go on from the one before with: dmd2 train --resume {run}" in errors
    assert "dmd2: error: Process 1 lost the other processes of this run" in errors
    assert "Traceback" not in errors
    assert newest_complete(run) == before

    weights = before / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (run / "checkpoints" / ".000004.partial").mkdir()
    with launched(main, argv, processes=2) as launch:
        assert launch.wait() == [0, 0]
        errors = launch.printed("err")
    assert f"the checkpoint {before} is skipped: student.safetensors is not what" in errors
    assert ".000004.partial was never finished and is not used" in errors
    assert (run / "lora.safetensors").read_bytes() == (pair / "lora.safetensors").read_bytes()


def test_export_of_the_last_checkpoint_is_the_runs_own_file(alone: Path, tmp_path: Path) -> None:
    """From the run's folder, and, for an earlier one, from the checkpoint's: other weights."""
    out = tmp_path / "last.safetensors"
    finish(main, ["export", str(alone), "--out", str(out)])
    assert out.read_bytes() == (alone / "lora.safetensors").read_bytes()
    early = tmp_path / "early.safetensors"
    checkpoint = alone / "checkpoints" / "000002"
    finish(main, ["export", str(checkpoint), "--out", str(early)])
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
    assert main([word.format(alone=alone) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("dmd2: error: ")
    assert message.format(alone=alone) in captured.err
    assert sorted(alone.rglob("*")) == before


def test_processes_share_the_step_differ_in_noise_and_skip_together(tmp_path: Path) -> None:
    finish(agreement_worker.main, tmp_path, processes=2)
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
        assert "critic's update was skipped 2 times in a row, the last at iter" in result["stop"]
    assert first["weights"] == second["weights"]


def test_what_the_user_got_wrong_ends_both_processes_with_a_sentence(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"")
    pictures, used = tmp_path / "pictures", tmp_path / "used"
    pictures.mkdir()
    (pictures / "0.png").write_bytes(b"no picture")
    (pictures / "0.txt").write_text("a caption")
    (tmp_path / "empty.txt").write_text("\n")
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    cases = {
        f"--model.path={tmp_path / 'old.ckpt'}": "old.ckpt is a pickle, which can run any code",
        f"--data.prompts={tmp_path / 'empty.txt'}": "empty.txt' has no caption; write at least one",
        f"--data.real_images={pictures}": "0.png cannot be read as a picture; replace or remove it",
        f"--data.cache={tmp_path / 'cache'}": "cache' holds nothing yet; run dmd2 prepare with",
        "--batch_size=3": "An iteration takes 6 real images of one size, but 128x128 has 4; add",
        "--model.prediction=v": "model.prediction is 'v' but has no effect",
    }
    run = f"--output.directory={tmp_path / 'run'}"
    commands = [[*without(arguments, case), run, case] for case in cases]
    cases[f"--output.directory={used}"] = "a folder that is not empty; name another one"
    commands.append([*arguments, f"--output.directory={used}"])
    with launched(agreement_worker.each_of, commands, processes=2) as launch:
        assert launch.wait() == [0, 0]
        assert launch.printed().split() == ["2"] * 2 * len(commands)
        errors = launch.printed("err")
    for sentence in cases.values():
        assert errors.count(sentence) == 2, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    assert [path.name for path in used.iterdir()] == ["mine.txt"]


def without(arguments: list[str], case: str) -> list[str]:
    """The arguments but for the key that the case gives."""
    key = case.partition("=")[0]
    return [word for word in arguments if word.partition("=")[0] != key]
