"""Hugging Face datasets: saved ones, splits, streamed ones; the hub only where it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train_lora.data.prompts import read_prompts
from train_lora.data.samples import BadSampleError
from train_lora.data.settings import DataConfig
from train_lora.data.sources import open_samples

from .picture_files import CAPTIONS, picture, picture_bytes

datasets = pytest.importorskip("datasets", reason="needs pip install '.[data]'")


def table() -> Any:
    """Four good rows, then a damaged picture, no picture and no caption."""
    images = [{"bytes": picture_bytes(number), "path": None} for number in range(4)]
    images += [{"bytes": picture_bytes(4)[:200], "path": None}, None, images[0]]
    return datasets.Dataset.from_dict(
        {"image": images, "caption": [*CAPTIONS, "a", "b", None]},
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string")}
        ),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    table().save_to_disk(folder / "one")
    parts = datasets.DatasetDict({"train": table().select(range(2)), "test": table()})
    parts.save_to_disk(folder / "splits")
    table().to_parquet(folder / "rows" / "train-00000.parquet")
    return folder


def settings(source: str | Path, **options: Any) -> DataConfig:
    return DataConfig(prompts=str(source), real_images=str(source), **options)


def check_rows(samples: list[Any]) -> None:
    assert len(samples) == 7
    for number, sample in enumerate(samples[:4]):
        image, caption = sample.load()
        assert caption == CAPTIONS[number]
        assert image.tobytes() == picture(number).tobytes()
    reasons = []
    for sample in samples[4:]:
        with pytest.raises(BadSampleError) as error:
            sample.load()
        reasons.append(error.value.reason)
    assert reasons == ["unreadable", "unreadable", "no caption"]
    stamps = [sample.stamp() for sample in samples]
    assert len(set(stamps)) == 7
    assert stamps == [sample.stamp() for sample in samples]


def test_a_saved_dataset(saved: Path) -> None:
    check_rows(list(open_samples(settings(saved / "one"))))
    assert read_prompts(settings(saved / "one")) == [*CAPTIONS, "a", "b"]


def test_splits(saved: Path) -> None:
    assert len(list(open_samples(settings(saved / "splits")))) == 2
    assert len(list(open_samples(settings(saved / "splits", split="test")))) == 7
    with pytest.raises(ValueError, match=r"no split 'val'; set data.split to one of train, test"):
        read_prompts(settings(saved / "splits", split="val"))


def test_a_hub_dataset_streamed_and_downloaded(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In place of the hub a folder of parquet files, read by the same function of the library."""
    load, asked = datasets.load_dataset, []

    def from_folder(name: str, *, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        cache = str(tmp_path / "cache")
        return load(str(saved / "rows"), split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    for stream in (True, False):
        check_rows(list(open_samples(settings("hub:someone/pictures", stream=stream))))
        assert read_prompts(settings("hub:someone/pictures", stream=stream))[:4] == [*CAPTIONS]
    assert set(asked) == {("someone/pictures", "train", stream) for stream in (True, False)}


def test_the_hub_is_asked_only_by_its_prefix(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set for all tests: the library itself refuses to go there."""
    with pytest.raises(
        ValueError, match=r"'hub:someone/none' cannot be read from the Hugging Face"
    ):
        list(open_samples(settings("hub:someone/none")))
    monkeypatch.setattr(datasets, "load_dataset", None)  # would fail if it were called
    with pytest.raises(ValueError, match=r"'someone/pictures', which does not exist.*hub:OWNER"):
        open_samples(settings("someone/pictures"))
    with pytest.raises(ValueError, match=r"write hub:OWNER/NAME, or the local path alone"):
        list(open_samples(settings(f"hub:{saved / 'rows'}")))
    with pytest.raises(FileNotFoundError, match=r"does not exist.*hub:OWNER/NAME"):
        read_prompts(settings("someone/pictures"))


def test_a_damaged_saved_dataset(saved: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(saved / "one", tmp_path / "one")
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read as a saved dataset"):
        read_prompts(settings(folder))
