"""The best checkpoint: chosen by a validation figure, kept, found again, exported."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest

from train_lora.best import BEST_FILE, HISTORY_FILE, Best, best_checkpoint, protected_checkpoints
from train_lora.checkpoint import read_state, restore
from train_lora.checkpoint_store import checkpoints
from train_lora.export_checkpoint import _find
from train_lora.loop import Trainer
from train_lora.validate import ValidationResult

from .tiny import small_trainer

SCRIPT = {
    "validation__every": 1,
    "validation__best": "diversity_gap",
    "checkpoint__every": 0,
    "checkpoint__keep_last": 1,
    "training__iterations": 4,
    "logging__trackers": "[]",
}


def scripted(trainer: Trainer, values: list[float]) -> Trainer:
    """Its validations find these values, the first after iteration 1."""

    def run() -> ValidationResult:
        value = values[trainer.iteration - 1]
        return ValidationResult(figures={"validation/diversity_gap": value}, pictures={})

    trainer.validation.run = run  # type: ignore[method-assign]
    return trainer


def saved(run: Path) -> list[int]:
    return sorted(int(folder.name) for folder in checkpoints(run))


def record(run: Path) -> dict[str, object]:
    return json.loads((run / BEST_FILE).read_text())


def test_the_best_is_saved_at_once_and_outlives_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    trainer = scripted(small_trainer(run, **SCRIPT), [0.5, 0.3, math.nan, 0.4])
    with caplog.at_level(logging.INFO):
        trainer.run()
    assert saved(run) == [2, 4]  # 1 was the best before, 4 is the end's
    expected = {
        "figure": "diversity_gap", "value": 0.3, "iteration": 2, "checkpoint": "checkpoints/000002",
    }  # fmt: skip
    assert record(run) == expected
    assert read_state(best_checkpoint(run))["iteration"] == 2
    assert f"best by diversity_gap: iteration 2 (0.3), in {run}/checkpoints/000002" in caplog.text
    assert f"dmd2 export {run} --checkpoint best --out" in caplog.text
    lines = [json.loads(line) for line in (run / HISTORY_FILE).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]


def test_a_resumed_run_knows_the_best_even_if_it_was_killed_before_saying_so(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    values = [0.5, 0.3, 0.4, 0.35, 0.2]
    scripted(small_trainer(run, **(SCRIPT | {"training__iterations": 3})), values).run()
    (run / BEST_FILE).unlink()
    with (run / HISTORY_FILE).open("a") as file:
        file.write('{"iteration": 4, "stamp"')  # cut short
    resumed = scripted(small_trainer(run, **SCRIPT), values)
    restore(resumed, run / "checkpoints" / "000003", read_state(run / "checkpoints" / "000003"))
    resumed.run()
    assert record(run)["iteration"] == 2
    assert saved(run) == [2, 4]
    longer = scripted(small_trainer(run, **(SCRIPT | {"training__iterations": 5})), values)
    restore(longer, run / "checkpoints" / "000004", read_state(run / "checkpoints" / "000004"))
    longer.run()
    assert record(run)["iteration"] == 5
    assert saved(run) == [5]


def test_only_validations_with_a_checkpoint_and_the_same_prompts_count(tmp_path: Path) -> None:
    first = Best(run=tmp_path, figure="diversity_gap", stamp="a")
    for iteration, value in ((1, 0.1), (2, 0.4), (3, 0.3)):
        first.note(iteration, {"validation/diversity_gap": value})
    for iteration in (2, 3):
        folder = tmp_path / "checkpoints" / f"{iteration:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    again = Best(run=tmp_path, figure="diversity_gap", stamp="a")
    again.recall()
    assert (again.iteration, again.value) == (3, 0.3)
    assert protected_checkpoints(tmp_path) == {3}
    other = Best(run=tmp_path, figure="diversity_gap", stamp="b")
    other.recall()
    assert other.iteration is None
    none = Best(run=tmp_path, figure="none", stamp="a")
    none.recall()
    assert none.iteration is None
    assert not none.note(5, {"validation/diversity_gap": 0.0})


def test_export_finds_the_checkpoint_that_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    scripted(small_trainer(run, **SCRIPT), [0.5, 0.3, 0.4, 0.4]).run()
    folders = {number: run / "checkpoints" / f"{number:06d}" for number in (2, 4)}
    assert _find(run, None) == _find(run, "newest") == folders[4]
    assert _find(run, "best") == _find(run, "2") == _find(folders[2], None) == folders[2]
    with pytest.raises(ValueError, match=r"'3'; name newest, best, or an iteration .*\(2, 4\)"):
        _find(run, "3")
    with pytest.raises(ValueError, match=r"--checkpoint is 'best', but .* one checkpoint already"):
        _find(folders[2], "best")
    shutil.rmtree(folders[2])
    with pytest.raises(ValueError, match=r"000002 is damaged: manifest.json: No such file"):
        _find(run, "best")
    (run / BEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no best checkpoint: it keeps one if"):
        _find(run, "best")
