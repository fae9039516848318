"""Work in processes of its own, alone or in pairs that train together, for tests that kill them.

They are forked from one that has imported the libraries already: a start takes a tenth of a second
in place of ten. A pair finds itself as under torchrun, by the same variables; `TORCHRUN` is that
launcher itself. (`accelerate launch --cpu --num_processes 2` would start one process.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch.distributed as dist
import torch.distributed.run

TORCHRUN = torch.distributed.run.main
TWO_PROCESSES = ["--standalone", "--nproc_per_node", "2"]
TWO_PROCESSES += ["--shutdown-timeout", "300"]  # for the save, on a busy machine
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900  # on a machine that is busy with other things
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}

_forked = "forkserver" in multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if _forked else "spawn")
if _forked:
    _context.set_forkserver_preload(["tests.train.preloaded"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Processes that were started together; what they print is in files."""

    processes: list[BaseProcess]
    folder: Path

    def printed(self, stream: str = "out") -> str:
        """By all processes, one after the other; `stream`: out or err."""
        files = sorted(self.folder.glob(f"*.{stream}"))
        return "".join(file.read_text(encoding="utf-8") for file in files)

    def wait(self) -> list[int | None]:
        """The exit codes, when all have ended."""
        for process in self.processes:
            process.join(PATIENCE_SECONDS)
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.printed("err")[-4000:]
        return codes

    def wait_for(self, path: Path) -> None:
        """Until the path is there, which one of the processes is to make."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not path.exists():
            assert all(process.is_alive() for process in self.processes), self.printed("err")
            assert time.monotonic() < deadline, f"no {path}"
            time.sleep(0.02)


@contextmanager
def launched(
    work: Callable[..., object],
    *arguments: object,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Launch]:
    """`work(*arguments)` in so many processes, killed at the end; what it returns is their exit
    code. `work` is a function of a module, imported as tests.train.MODULE."""
    variables: dict[str, str] = dict(environment or {})
    store = None
    if processes > 1:  # held here, as torchrun holds it: no port is chosen before it is taken
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if store is not None else {}
            parts = (Path(folder) / str(rank), variables | own, work, arguments)
            started.append(_context.Process(target=_run, args=parts))
        launch = Launch(processes=started, folder=Path(folder))
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the first start makes the common parent
            for process in started:
                process.start()
        try:
            yield launch
        finally:
            for process in started:
                for pid in (*workers_of(process).values(), process.pid):
                    with suppress(ProcessLookupError):
                        if process.is_alive():
                            os.kill(pid, signal.SIGKILL)
                process.join()


def _run(
    prints: Path, environment: dict[str, str], work: Callable[..., int], arguments: tuple
) -> None:
    os.environ.update(environment)
    for number, stream in ((1, "out"), (2, "err")):
        with prints.with_suffix(f".{stream}").open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.exit(work(*arguments))


def finish(
    work: Callable[..., object],
    *arguments: object,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> str:
    """`launched` to its good end; what it has printed."""
    with launched(work, *arguments, processes=processes, environment=environment) as launch:
        codes = launch.wait()
        assert codes == [0] * processes, launch.printed("err")[-4000:]
        return launch.printed()


def workers_of(launcher: BaseProcess) -> dict[int, int]:
    """RANK -> process id of torchrun's children."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    ranks = {}
    for pid in children.read_text().split() if children.exists() else ():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            ranks[int(rank)] = int(pid)
    return ranks
