"""Commands as processes of their own, alone or in pairs (torchrun, gloo), for tests that kill them.

`accelerate launch --cpu --num_processes 2` would start one process; torchrun starts two.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ALONE = [sys.executable, "-m", "train_lora.cli"]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHER += ["--shutdown-timeout", "300"]  # for the save, on a busy machine
PAIR = [*LAUNCHER, "-m", "train_lora.cli"]
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900  # on a machine that is busy with other things
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        for pid in (*workers_of(process).values(), process.pid):
            if process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def finish(command: Sequence[str]) -> None:
    with started(command) as process:
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, errors[-4000:]


def workers_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """RANK -> process id of a launcher's children."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    ranks = {}
    for pid in children.read_text().split() if children.exists() else ():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            ranks[int(rank)] = int(pid)
    return ranks


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
