"""For every test: no hub, exact arithmetic."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of these libraries
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

# Processes that tests start import the libraries in a third of the time where bytecode is kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker on each core: more threads would only wait
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _exact_arithmetic() -> None:
    """TF32 off, so that tolerances mean on a GPU what they mean on a CPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `dmd2 demo` leaves: about six minutes, once for all tests that need it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "demo_output"
    with (shared / "demo.lock").open("w") as lock:  # the other worker waits for this one's
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "stdout.txt").exists():
            command = [sys.executable, "-m", "train_lora.cli", "demo", "--out", str(folder)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-4000:]
            (folder / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return folder
