"""Captioned pictures from every kind of source give the same samples; what is bad says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from train_lora.data.samples import BadSampleError
from train_lora.data.settings import DataConfig
from train_lora.data.sources import open_samples

from .picture_files import (
    CAPTIONS,
    captioned_folder,
    metadata_folder,
    picture,
    picture_bytes,
    tar_folder,
    write_tar,
)

COUNT = 4


def samples_of(source: Path | str, **options: Any) -> list[Any]:
    return list(open_samples(DataConfig(prompts="p.txt", real_images=str(source), **options)))


def parquet_folder(folder: Path, count: int) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    images = [{"bytes": picture_bytes(number), "path": None} for number in range(count)]
    table = pyarrow.table({"image": images, "text": list(CAPTIONS[:count])})
    parquet.write_table(table.slice(0, 1), folder / "0.parquet")
    parquet.write_table(table.slice(1), folder / "1.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, count: captioned_folder(folder, [(128, 128)] * count),
        metadata_folder,
        tar_folder,
        parquet_folder,
    ],
    ids=["txt", "metadata.jsonl", "tar", "parquet"],
)
def test_every_source_gives_the_same_samples(
    tmp_path: Path, make: Callable[[Path, int], Path]
) -> None:
    samples = samples_of(make(tmp_path / "source", COUNT))
    assert len(samples) == COUNT
    for number, sample in enumerate(samples):
        image, caption = sample.load()
        assert caption == CAPTIONS[number]
        assert numpy.array_equal(numpy.asarray(image), numpy.asarray(picture(number)))
    assert len({sample.name for sample in samples}) == COUNT
    again = samples_of(tmp_path / "source")
    assert [s.stamp() for s in samples] == [s.stamp() for s in again]


def reasons(samples: list[Any]) -> dict[str, str]:
    found = {}
    for sample in samples:
        try:
            sample.load()
        except BadSampleError as error:
            found[error.reason] = str(error)
    return found


def test_bad_files_of_a_folder(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "a", [(64, 64)] * 6)
    (folder / "000.txt").unlink()
    (folder / "001.txt").write_text(" \n")
    (folder / "002.png").write_bytes(picture_bytes(2)[:200])
    (folder / "003.txt").write_bytes(b"caf\xe9")
    (folder / "004.png").rename(folder / "other.png")
    (folder / "other.txt").write_text("fine")
    (folder / "._005.png").write_bytes(b"macOS leaves such files")
    found = reasons(samples_of(folder))
    assert sorted(found) == [
        "caption without picture",
        "empty caption",
        "no caption",
        "unreadable",
        "unreadable caption",
    ]
    assert "000.png has no caption; write one into" in found["no caption"]
    assert "002.png cannot be read as a picture; replace or remove it" in found["unreadable"]
    assert "004.txt is a caption without a picture" in found["caption without picture"]


def test_a_changed_picture_or_caption_changes_the_stamp(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "a", [(64, 64)] * 2)
    before = [sample.stamp() for sample in samples_of(folder)]
    (folder / "001.txt").write_text("another caption")
    after = [sample.stamp() for sample in samples_of(folder)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_bad_lines_of_metadata(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path / "a", 2)
    lines = (folder / "metadata.jsonl").read_text()
    picture(9).save(folder / "unlisted.png")
    more = {"file_name": "gone.png", "text": "x"}
    (folder / "metadata.jsonl").write_text(f"{lines}\n{json.dumps(more)}\n")
    found = reasons(samples_of(folder))
    assert sorted(found) == ["caption without picture", "no caption"]
    assert "unlisted.png has no line in" in found["no caption"]
    assert "line 3 names" in found["caption without picture"]
    for name in ("../secret.png", "/etc/secret.png", "..\\secret.png"):
        row = json.dumps({"file_name": name, "text": "x"})
        (folder / "metadata.jsonl").write_text(row)
        with pytest.raises(ValueError, match=r"which is outside of"):
            samples_of(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "deep/0.png", "label": 1}')
    with pytest.raises(ValueError, match=r"none of the columns text.*set data.caption_column"):
        samples_of(folder)


def test_tars_take_captions_from_json_and_skip_other_members(tmp_path: Path) -> None:
    row = json.dumps({"caption": "from json", "tags": "of tags"}).encode()
    files = {
        "part/a.b.JPG": b"",  # key part/a, suffix .b.jpg: no picture of this sample
        "x/0.png": picture_bytes(0),
        "x/0.json": row,
        "x/0.pyd": b"cos\nsystem\n(S'false'\ntR.",  # a pickle: never opened
        "x/1.txt": b"alone",
    }
    path = write_tar(tmp_path / "a.tar", files)
    samples = samples_of(path)
    assert [sample.name.rpartition(":")[2] for sample in samples] == ["part/a", "x/0", "x/1"]
    assert samples[1].load()[1] == "from json"
    assert samples_of(path, caption_column="tags")[1].load()[1] == "of tags"
    assert "x/1 has no picture" in reasons(samples)["caption without picture"]


def test_damaged_and_empty_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": picture_bytes(0), "0.txt": b"x"})
    content = path.read_bytes()
    for damaged in (content[:700], b"no tar at all" * 100, b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.tar .*write or download it again"):
            samples_of(path)


def test_missing_unknown_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent', which does not exist; name a folder of pict"):
        samples_of(tmp_path / "absent")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.zip', whose format is unknown"):
        samples_of(tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' has no picture"):
        samples_of(tmp_path / "empty")


def test_parquet_columns(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "a", 2)
    with pytest.raises(ValueError, match=r"no column 'photo'; set data.image_column to one of im"):
        samples_of(folder, image_column="photo")
    with pytest.raises(ValueError, match=r"row 0 has a str where a picture should be"):
        samples_of(folder, image_column="text")[0].load()
