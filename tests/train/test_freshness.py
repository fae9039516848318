"""A cache that is older than the pictures and captions it was made from is noticed at training."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from train_lora import prepare, trainer
from train_lora.config import Config
from train_lora.data.freshness import SOURCES, changed_sources

from .picture_files import captioned_folder, metadata_folder, picture, tar_folder
from .tiny import demo_config

pytestmark = pytest.mark.usefixtures("tiny_model")


def prepared(tmp_path: Path, images: Path) -> Config:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\na green star\n")
    config = demo_config(
        tmp_path / "run",
        data__prompts=prompts,
        data__real_images=images,
        data__cache=tmp_path / "cache",
        training__batch_size=1,
    )
    prepare.prepare(config)
    assert changed_sources(config) is None
    return config


def test_what_changed_is_counted_by_kind_and_prepared_anew(tmp_path: Path) -> None:
    photos = captioned_folder(tmp_path / "photos", [(128, 128)] * 4)
    config = prepared(tmp_path, photos)
    (photos / "notes.md").write_text("read by nobody")
    assert changed_sources(config) is None
    (photos / "001.txt").write_text("a caption written anew")
    (photos / "002.txt").unlink()
    (photos / "002.png").unlink()
    picture(5).save(photos / "004.png")
    message = (
        r"cache' is older than data.real_images: .* \(1 changed, 1 new, 2 gone\), such as "
        r".*photos/001.txt; run dmd2 prepare again"
    )
    with pytest.raises(ValueError, match=message):  # before a model is loaded
        trainer.train(config)
    assert not (tmp_path / "run").exists()
    prepare.prepare(config)
    assert changed_sources(config) is None


def test_a_prompt_of_the_same_length_is_noticed_by_its_time(tmp_path: Path) -> None:
    config = prepared(tmp_path, captioned_folder(tmp_path / "photos", [(128, 128)]))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na green ring\n")
    os.utime(prompts, (1, 1))
    said = str(changed_sources(config))
    assert "is older than data.prompts" in said
    assert said.endswith(f"(1 changed), such as {prompts}")


@pytest.mark.parametrize("make", [metadata_folder, tar_folder])
def test_a_line_in_metadata_and_a_rewritten_tar_are_noticed(tmp_path: Path, make) -> None:
    source = make(tmp_path / "source", 2)
    config = prepared(tmp_path, source)
    changed = next(path for path in sorted(source.iterdir()) if path.suffix in (".jsonl", ".tar"))
    os.utime(changed, (1, 1))
    assert f"(1 changed), such as {changed}" in str(changed_sources(config))


def test_a_copy_elsewhere_is_compared_by_names_and_sizes(tmp_path: Path) -> None:
    photos = captioned_folder(tmp_path / "photos", [(128, 128)])
    config = prepared(tmp_path, photos)
    copy = tmp_path / "host" / "photos"
    shutil.copytree(photos, copy, copy_function=shutil.copy)  # with times of its own
    object.__setattr__(config.data, "real_images", str(copy))
    assert changed_sources(config) is None
    (copy / "000.txt").write_text("a caption written anew")
    assert "(1 changed)" in str(changed_sources(config))
    shutil.rmtree(copy)
    assert changed_sources(config) is None  # the cache alone is enough


def test_a_run_that_goes_on_is_told_and_a_cache_without_record_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = captioned_folder(tmp_path / "photos", [(128, 128)])
    config = prepared(tmp_path, photos)
    (photos / "000.txt").write_text("a caption written anew")
    with caplog.at_level(logging.WARNING):
        trainer._check_freshness(config, resumed=True)
    assert "(1 changed)" in caplog.text
    assert "the run goes on with what was prepared then" in caplog.text
    (tmp_path / "cache" / SOURCES).unlink()
    with pytest.raises(ValueError, match=r"sources.json is missing or damaged; run dmd2 prepare"):
        trainer.train(config)
