"""Two real processes: records are means of both, validation is shared by both and kept by one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train import watch_worker
from tests.train.launching import finish

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo, as in test_processes.py")


def test_records_and_validation_of_two_processes(tmp_path: Path) -> None:
    finish(watch_worker.main, tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    # 1, 3, 8 in one process; 2, 4 and one that is not a number in the other.
    assert first["means"] == second["means"] == {"loss": pytest.approx(18 / 5), "rare": 5.0}
    assert first["results"] == [True, True, True]
    assert second["results"] == [False, False, False]
    # Of the latents, 3 pieces of 4 passes each; of the panels, 3 timesteps x 2 pieces of a pass of
    # teacher and critic each.
    assert first["passes"] == [2 * 4 + 3 * 2, 3 * 4 + 6 * 2]
    assert second["passes"] == [1 * 4 + 3 * 2, 3 * 4 + 6 * 2]
    assert first["different"] == second["different"] == []
    assert first["saved"] == second["saved"] == 3
    assert first["weights"] == second["weights"]

    run = tmp_path / "run"
    assert len(list((run / "samples").iterdir())) == len(list((run / "panels").iterdir())) == 3
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    best = json.loads((run / "best.json").read_text())
    name = "validation/statistics_distance"
    assert best["value"] == min(line["figures"][name] for line in lines)
    assert (run / best["checkpoint"] / "manifest.json").is_file()
    assert len(list((run / "logs").glob("events.*"))) == 1
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    (loss,) = events.Scalars("loss/critic")
    assert loss.step == 3
    assert math.isfinite(loss.value)
