"""Going back to an earlier checkpoint: nothing is overwritten, nothing lost."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from train_lora import cli, trainer
from train_lora.best import BEST_FILE, HISTORY_FILE, noted
from train_lora.checkpoint_store import checkpoints
from train_lora.config_text import to_toml
from train_lora.export_checkpoint import _find
from train_lora.rewind import set_aside

from .tiny import SMALL, demo_config, random_components, small_data, small_trainer


def test_the_named_checkpoint_is_gone_back_to_and_leads_to_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "load_model", lambda config, device: random_components())
    data = small_data(prompts=6, images=5)
    monkeypatch.setattr(trainer, "load_training_data", lambda *_, **__: data)
    run = tmp_path / "run"
    done = small_trainer(
        run,
        training__iterations=2,
        checkpoint__every=1,
        critic__updates_per_generator=1,
        logging__trackers="[]",
    )
    done.run()
    done.export(run / "lora.safetensors")
    (run / "config.toml").write_text(to_toml(done.config))
    first = (run / "lora.safetensors").read_bytes()
    caplog.set_level(logging.INFO)
    assert cli.main(["train", "--resume", str(run / "checkpoints" / "000001")]) == 0
    aside = run / "set_aside" / "001"
    assert f"what the run made after iteration 1 is now in {aside}" in caplog.text
    assert {path.name for path in aside.iterdir()} == {"checkpoints", "lora.safetensors"}
    assert _find(aside, "2") == aside / "checkpoints" / "000002"  # what dmd2 export reads
    assert (aside / "lora.safetensors").read_bytes() == first
    assert (run / "lora.safetensors").read_bytes() == first
    assert [folder.name for folder in checkpoints(run)] == ["000002", "000001"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of four iterations leaves, as empty files."""
    run = tmp_path / "run"
    for iteration in (1, 2, 3, 4):
        (run / "checkpoints" / f"{iteration:06d}").mkdir(parents=True)
    (run / "samples").mkdir()
    lines = [{"iteration": i, "stamp": "s", "figures": {"a": i / 7}} for i in (2, 4)]
    (run / HISTORY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / BEST_FILE).write_text(json.dumps({"iteration": 4}))
    for name in ("samples/000002.png", "samples/000004.png", "lora.safetensors"):
        (run / name).touch()
    (run / "config.toml").write_text(to_toml(demo_config(run, **SMALL)))
    return run


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_later_is_moved_and_a_second_time_into_a_folder_of_its_own(run: Path) -> None:
    assert set_aside(run, 3) == run / "set_aside" / "001"
    assert names(run / "set_aside" / "001") == {
        "checkpoints", "checkpoints/000004", "samples", "samples/000004.png",
        "lora.safetensors", BEST_FILE, HISTORY_FILE,
    }  # fmt: skip
    assert [folder.name for folder in checkpoints(run)] == ["000003", "000002", "000001"]
    assert [line["iteration"] for line in noted(run / "set_aside" / "001")] == [2, 4]
    assert [line["iteration"] for line in noted(run)] == [2]
    assert set_aside(run, 3) is None
    assert set_aside(run, 2) == run / "set_aside" / "002"
    assert names(run / "set_aside" / "002") == {"checkpoints", "checkpoints/000003"}


def test_a_checkpoint_that_is_not_there_or_damaged_is_named_and_nothing_moves(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run)
    for name, message in (
        ("000009", "run has no checkpoint of iteration 9; it has: 1, 2, 3, 4."),
        ("000002", "000002 is damaged: manifest.json: No such file"),
    ):
        assert cli.main(["train", "--resume", str(run / "checkpoints" / name)]) == 2
        assert message in capsys.readouterr().err
    assert names(run) == before
