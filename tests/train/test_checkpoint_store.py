"""Checkpoint folders: whole or not there, damaged ones named and passed over, old ones purged."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from train_lora.checkpoint_store import (
    CheckpointStore,
    checkpoints,
    damage,
    newest_complete,
    write_text,
)
from train_lora.output import check_output_directory


def store(run: Path, keep_last: int = 10, keep_every: int = 0) -> CheckpointStore:
    return CheckpointStore(run=run, keep_last=keep_last, keep_every=keep_every)


def save(run: Path, iteration: int, text: str = "content", **keeping: int) -> Path:
    def fill(folder: Path) -> None:
        (folder / "weights").write_text(text * 100)
        (folder / "state.json").write_text(f'{{"iteration": {iteration}}}')

    return store(run, **keeping).write(iteration, 1000, fill)


def content(run: Path) -> dict[str, bytes]:
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_the_newest_is_found_by_number_and_not_by_name(tmp_path: Path) -> None:
    for iteration in (999_999, 1_000_000, 20):
        save(tmp_path, iteration)
    assert newest_complete(tmp_path).name == "1000000"
    assert [folder.name for folder in checkpoints(tmp_path)] == ["1000000", "999999", "000020"]
    assert all(damage(folder) is None for folder in checkpoints(tmp_path))


def cut_short(folder: Path) -> None:
    (folder / "weights").write_text("cont")


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[350] ^= 1
    (folder / "weights").write_bytes(data)


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def later_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut_short, "weights has 4 bytes and not 700"),
        (flip_a_bit, "weights is not what was written"),
        (lambda folder: (folder / "weights").unlink(), "weights: No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
        (empty_manifest, "manifest.json cannot be read"),
        (later_format, "its format is 2, this version reads 1"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], reason: str
) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    harm(newer)
    assert newest_complete(tmp_path) == older
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(newer) in record.getMessage()
    assert reason in record.getMessage()


def test_a_run_without_a_usable_checkpoint_is_an_error_and_no_start_at_zero(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"is no folder"):
        newest_complete(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"it has no checkpoint"):
        newest_complete(tmp_path)
    cut_short(save(tmp_path, 10))
    with pytest.raises(ValueError, match=r"every checkpoint in it is damaged"):
        newest_complete(tmp_path)


def test_what_a_killed_process_left_is_named_not_used_and_swept_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = save(tmp_path, 10)
    unfinished = older.with_name(".000020.partial")
    unfinished.mkdir()
    (unfinished / "half").write_text("x")
    assert newest_complete(tmp_path) == older
    assert str(unfinished) in caplog.text
    newer = save(tmp_path, 30)
    assert newest_complete(tmp_path) == newer
    assert sorted(path.name for path in newer.parent.iterdir()) == ["000010", "000030"]


def test_a_damaged_checkpoint_gives_way_to_a_new_one_of_the_same_iteration(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    cut_short(folder)
    assert save(tmp_path, 10) == folder
    assert damage(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["000010"]


def test_the_last_and_every_nth_are_kept(tmp_path: Path) -> None:
    for iteration in range(10, 90, 10):
        save(tmp_path, iteration, keep_last=2, keep_every=30)
    assert [int(folder.name) for folder in checkpoints(tmp_path)] == [80, 70, 60, 30]


def test_a_purge_that_fails_is_told_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = save(tmp_path, 10)
    old.with_name(".000010.removed").write_text("a file where the folder would be moved to")
    new = save(tmp_path, 20, keep_last=1)
    assert damage(new) is None
    assert f"{old} cannot be removed" in caplog.text


def test_too_little_space_is_one_sentence_and_earlier_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"iteration 20 cannot be saved .*no space left: it needs"):
        store(tmp_path).write(20, 2**70, lambda folder: None)
    assert content(tmp_path) == before


def test_a_write_that_fails_half_way_leaves_nothing_and_earlier_ones_stay(tmp_path: Path) -> None:
    """The system itself refuses: a limit on the size of files, below what is written."""
    save(tmp_path, 10)
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError, match=r"\(File too large\); earlier .* train --resume"):
            save(tmp_path, 20, text="content" * 100)
        with pytest.raises(ValueError, match=r"Mend that, then start again"):
            save(tmp_path / "without", 20, text="content" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000010"]


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write_text(tmp_path / "config.toml", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.filename == str(tmp_path / "config.toml")
    assert not (tmp_path / "config.toml").exists()


def test_a_used_folder_with_checkpoints_says_how_to_go_on(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(ValueError, match=r"not empty; .* dmd2 train --resume .*"):
        check_output_directory(tmp_path, "--output.directory")
