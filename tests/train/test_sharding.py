"""Full weights over two processes (FSDP2, gloo): the updates and files of one process."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train import sharding_worker
from tests.train.hasty import main
from tests.train.launching import TORCHRUN, finish, launched
from tests.train.sharding_worker import draw, full_trainer, iterate
from train_lora.checkpoint import read_state, restore
from train_lora.sharding import clip_gradients

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, two micro-batches of 1 in each."""
    folder = tmp_path_factory.mktemp("pair")
    finish(sharding_worker.main, folder, processes=2)
    return folder


@pytest.fixture(scope="module")
def seen(pair: Path) -> list[dict[str, Any]]:
    """By each of the two."""
    return [json.loads((pair / f"{rank}.json").read_text()) for rank in (0, 1)]


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "checkpoints" / "000001" / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "tolerance"),
    # Data and noise are the same bit for bit, and the same passes give the same gradient but for
    # the order of sums. Passes with other batches round otherwise, also within one process: 5e-5
    # of the student's gradient, which is a small difference between teacher and critic.
    [(1, 4, 1e-6), (4, 1, 2e-4)],
)
def test_two_processes_with_half_the_batch_make_the_same_update(
    pair: Path,
    seen: list[dict[str, Any]],
    tmp_path: Path,
    batch_size: int,
    accumulated: int,
    tolerance: float,
) -> None:
    assert [result["processes"] for result in seen] == [2, 2]
    assert seen[0]["norms"] == seen[1]["norms"]
    norms = iterate(full_trainer(tmp_path, batch_size, accumulated), 1)
    assert seen[0]["norms"][:2] == pytest.approx(norms, rel=tolerance)
    for role in ("student", "critic"):
        one, two = (tensors(folder, f"{role}_optimizer") for folder in (tmp_path, pair))
        assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
        # After one update Adam's mean is a tenth of the gradient that it was given.
        a, b = (
            torch.cat([t.flatten() for n, t in sorted(part.items()) if n.endswith(".exp_avg")])
            for part in (one, two)
        )
        assert (a - b).norm() < tolerance * a.norm(), role


def test_each_process_holds_half_of_the_weights(seen: list[dict[str, Any]]) -> None:
    for result in seen:
        assert result["elements_held"] == pytest.approx(result["elements"] / 2, rel=0.01)
    assert sum(result["elements_held"] for result in seen) == seen[0]["elements"]


def test_a_signal_to_one_process_lets_both_save_and_leave(
    pair: Path, seen: list[dict[str, Any]]
) -> None:
    """What they save is compared with a run that goes on, below."""
    for result in seen:
        assert "stopped by SIGTERM after iteration 4 and saved" in result["stopped"]
    assert (pair / "run" / "checkpoints" / "000004" / "manifest.json").is_file()


def test_a_resumed_pair_has_the_same_bits(seen: list[dict[str, Any]]) -> None:
    assert [result["different_when_resumed"] for result in seen] == [[], []]


def test_one_process_goes_on_from_two_draws_and_exports_the_same(
    pair: Path, tmp_path: Path
) -> None:
    trainer = full_trainer(tmp_path, 4, 1)
    checkpoint = pair / "run" / "checkpoints" / "000004"
    restore(trainer, checkpoint, read_state(checkpoint))
    trainer.export(tmp_path / "lora.safetensors")
    for name in ("lora.safetensors", "student.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(pair / "run" / name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert torch.equal(draw(trainer), load_file(pair / "drawn.safetensors")["latents"])


def test_what_is_not_finite_in_one_process_is_skipped_by_both(seen: list[dict[str, Any]]) -> None:
    assert [result["skipped"] for result in seen] == [1, 1]
    assert [result["changed_by_skipped"] for result in seen] == [[], []]


def test_what_cannot_be_sharded_is_refused(seen: list[dict[str, Any]]) -> None:
    of_states, of_compilation, without = seen[0]["refusals"]
    full = 'but student.kind is "full" and there are 2 processes'
    assert f'training.optimizer is "adamw8bit", {full}' in of_states
    assert f"training.compile is true, {full}" in of_compilation
    assert without == ""


def test_gradients_are_clipped_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for size in (3, 40):
        both = [torch.nn.Parameter(torch.zeros(size)) for _ in range(2)]
        both[0].grad = torch.randn(size, generator=generator)
        both[1].grad = both[0].grad.clone()
        pairs.append(both)
    ours, theirs = zip(*pairs, strict=True)
    for max_norm in (100.0, 0.5):
        norm = clip_gradients(ours, max_norm)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


# -- `dmd2 train` ----------------------------------------------------------------------------------


def host(number: int, port: int) -> list[str]:
    """Of torchrun on one of two hosts, which meet as docs/runs.md says."""
    place = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)]
    place += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [*place, "-m", "tests.train.hasty"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a full student beside a LoRA critic, never stopped."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "prompts.txt").write_text("a red ring\na green star\na blue ring\n")
    settings = {
        "data.prompts": folder / "prompts.txt",
        "output.directory": folder / "run",
        "training.iterations": 4,
        "training.batch_size": 1,
        "student.kind": "full",
        "student.rank": 2,
        "critic.rank": 2,
        "critic.updates_per_generator": 1,
        "validation.every": 4,
        "validation.num_prompts": 1,
        "checkpoint.every": 2,
        "checkpoint.keep_every": 2,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    command = ["train", "--preset", "demo", "--ablate", "no-gan", *arguments]
    port = free_port()
    with (
        launched(TORCHRUN, [*host(0, port), *command]) as first,
        launched(TORCHRUN, [*host(1, port), *command]) as second,
    ):
        for launch in (first, second):
            assert launch.wait() == [0], launch.printed("err")[-4000:]
    return folder / "run"


def test_two_hosts_leave_one_run(two_hosts: Path) -> None:
    state = json.loads((two_hosts / "checkpoints" / "000004" / "state.json").read_text())
    assert state["matches"]["global batch"] == 2
    left = {path.name for path in two_hosts.iterdir()}
    assert {"lora.safetensors", "student.safetensors", "samples", "checkpoints"} <= left


def test_a_lost_process_is_told_and_the_rest_goes_on_to_the_same_files(
    two_hosts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_hosts, run)
    shutil.rmtree(run / "checkpoints" / "000004")
    for name in ("lora.safetensors", "student.safetensors"):
        (run / name).unlink()
    argv = ["train", "--resume", str(run), "--iterations"]
    with launched(main, [*argv, "100000"], processes=2) as launch:
        launch.wait_for(run / "checkpoints" / "000004")
        launch.processes[1].kill()
        assert launch.wait() == [2, -signal.SIGKILL]
        errors = launch.printed("err")
        assert "dmd2: error: Process 0 lost the other processes of this run" in errors
        assert "Traceback" not in errors
    for path in (run / "checkpoints").iterdir():  # back to 2 iterations
        if path.name != "000002":
            shutil.rmtree(path)
    finish(main, [*argv, "4"], processes=2)
    for name in ("lora.safetensors", "student.safetensors"):
        assert (run / name).read_bytes() == (two_hosts / name).read_bytes(), name
