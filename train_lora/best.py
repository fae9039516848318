"""Which checkpoint is the best so far, by the figure of `validation.best`.

validation.jsonl has the figures of every validation, one line each; best.json names the best
checkpoint that exists. The second follows from the first and is written anew when a run goes on,
so that no kill between two files can leave them apart.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_store import MANIFEST, write_text
from .output import CHECKPOINTS

log = logging.getLogger(__name__)

BEST_FILE, HISTORY_FILE = "best.json", "validation.jsonl"


@dataclass(slots=True)
class Best:
    """The best validation of a run; the lowest figure wins, the earlier of equal ones stays."""

    run: Path
    figure: str
    """As in `validation.best`; "none": no validation is ever the best."""
    stamp: str
    """`Validation.stamp`: figures of other prompts or seeds do not count."""
    iteration: int | None = None
    value: float = math.inf

    def note(self, iteration: int, figures: Mapping[str, float]) -> bool:
        """Keep the figures of a validation; whether it is the best, so that it is to be saved."""
        line = {"iteration": iteration, "stamp": self.stamp, "figures": dict(figures)}
        self.run.mkdir(parents=True, exist_ok=True)
        with (self.run / HISTORY_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return self._take(line)

    def recall(self) -> None:
        """At the start: the best of what an earlier process noted and saved."""
        history = self.run / HISTORY_FILE
        if self.figure == "none" or not history.exists():
            return
        if not history.read_bytes().endswith(b"\n"):  # cut short: what follows is a line of its own
            with history.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in noted(self.run):
            if (_folder(self.run, line["iteration"]) / MANIFEST).exists():
                self._take(line)
        if self.iteration is not None:
            self.write()

    def write(self) -> None:
        """Say it in best.json; to be called when its checkpoint is there."""
        assert self.iteration is not None
        record = {
            "figure": self.figure,
            "value": self.value,
            "iteration": self.iteration,
            "checkpoint": f"{CHECKPOINTS}/{self.iteration:06d}",
        }
        write_text(self.run / BEST_FILE, json.dumps(record, indent=1) + "\n")

    def say(self) -> None:
        if self.iteration is not None:
            log.info(
                "best by %s: iteration %d (%.4g), in %s; for its LoRA: dmd2 export %s "
                "--checkpoint best --out FILE.safetensors",
                *(self.figure, self.iteration, self.value),
                *(_folder(self.run, self.iteration), self.run),
            )

    def _take(self, line: Mapping[str, Any]) -> bool:
        value = line["figures"].get(f"validation/{self.figure}", math.nan)
        if line["stamp"] != self.stamp or not value < self.value:  # NaN is never the best
            return False
        self.iteration, self.value = line["iteration"], value
        return True


def protected_checkpoints(run: Path) -> set[int]:
    """Iterations whose checkpoints are never purged: the best one, once best.json names it."""
    record = _record(run)
    return set() if record is None else {int(record["iteration"])}


def best_checkpoint(run: Path) -> Path:
    """The folder that best.json names; ValueError where there is none."""
    record = _record(run)
    if record is None:
        raise ValueError(
            f"{run} has no best checkpoint: it keeps one if validation.every and validation.best "
            "are set, from its first validation on. Name another by --checkpoint."
        )
    return _folder(run, int(record["iteration"]))


def noted(run: Path) -> list[dict[str, Any]]:
    """The lines that are whole; the last may have been cut short."""
    lines = []
    for text in (run / HISTORY_FILE).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            int(line["iteration"]), line["stamp"], line["figures"]
        except (ValueError, KeyError, TypeError):
            continue
        lines.append(line)
    return lines


def _folder(run: Path, iteration: int) -> Path:
    return run / CHECKPOINTS / f"{iteration:06d}"


def _record(run: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((run / BEST_FILE).read_text(encoding="utf-8"))
        int(record["iteration"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{run / BEST_FILE} cannot be read; remove it: dmd2 train --resume {run} writes it "
            "again."
        ) from error
    assert isinstance(record, dict)
    return record
