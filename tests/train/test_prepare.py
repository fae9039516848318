"""`dmd2 prepare` on real files and the tiny model: what is left out, stopped, done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train_lora import cli, prepare
from train_lora.data import encode
from train_lora.data.training_data import load_training_data

from .picture_files import captioned_folder, picture_bytes
from .prepared import contents, report_of

pytestmark = pytest.mark.usefixtures("tiny_model")


def test_bad_samples_are_left_out_counted_and_listed(data_config, photos) -> None:
    (photos / "000.txt").unlink()
    (photos / "001.png").write_bytes(picture_bytes(1)[:300])
    (photos / "002.txt").write_text("")
    (photos / "lost.txt").write_text("where is my picture")
    small = captioned_folder(photos / "small", [(60, 60)])
    report = report_of(data_config())
    assert report["pictures"] == 3
    assert report["num_left_out"] == {
        "caption without picture": 1,
        "empty caption": 1,
        "no caption": 1,
        "too small": 1,
        "unreadable": 1,
    }
    assert str(photos / "001.png") in report["left_out"]["unreadable"][0]
    assert str(small / "000.png") in report["left_out"]["too small"][0]


def test_strict_fails_after_everything_else_was_encoded(data_config, photos, tmp_path) -> None:
    (photos / "000.txt").unlink()
    with pytest.raises(ValueError, match=r"Some samples cannot be used \(1 no caption\).*--strict"):
        prepare.prepare(data_config(), strict=True)
    assert list((tmp_path / "cache").glob("pictures-*"))
    assert report_of(data_config())["pictures"] == 5


def test_no_usable_picture_stops_with_the_reasons(data_config, photos) -> None:
    for file in photos.glob("*.txt"):
        file.write_text("")
    with pytest.raises(ValueError, match=r"no usable picture \(6 empty caption\); .*report.json"):
        prepare.prepare(data_config())


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "UNIT_PICTURES", 2)
    monkeypatch.setattr(encode, "UNIT_PROMPTS", 3)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Path]:
    """Each shard written is noted; the one after `count` is a kill."""
    written: list[Path] = []
    write = prepare.write_shard

    def spy(path: Path, *rest: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        write(path, *rest)
        written.append(path)

    monkeypatch.setattr(prepare, "write_shard", spy)
    return written


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(
    data_config, tmp_path, monkeypatch, small_units, shared_components
) -> None:
    whole = data_config(data__cache=tmp_path / "whole")
    report = report_of(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(data_config())
    (tmp_path / "cache" / ".pictures-000001.safetensors.99.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is incomplete, its preparation was stopped; run dmd2"):
        load_training_data(data_config(), shared_components)
    written = stop_after(monkeypatch, 1000)
    assert report_of(data_config()) == report
    assert len(written) == 6 - 4  # 3 shards of prompts, 3 of pictures
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    load_training_data(data_config(), shared_components)


def test_a_changed_caption_costs_its_own_shard_only(
    data_config, photos, monkeypatch, small_units, tmp_path, shared_components
) -> None:
    report_of(data_config())
    written = stop_after(monkeypatch, 1000)
    report_of(data_config())
    assert written == []
    (photos / "003.txt").write_text("a caption written anew")
    (photos / "005.txt").unlink()
    (photos / "005.png").unlink()
    (photos / "004.txt").unlink()
    (photos / "004.png").unlink()
    assert report_of(data_config())["pictures"] == 4
    assert [path.name for path in written] == ["pictures-000001.safetensors"]
    assert not (tmp_path / "cache" / "pictures-000002.safetensors").exists()
    table = load_training_data(data_config(training__batch_size=2), shared_components)
    captions = [c for bucket in table.buckets for c in bucket.images.captions(range(2))]
    assert "a caption written anew" in captions


def test_pictures_are_never_all_in_memory(data_config, photos, monkeypatch, small_units) -> None:
    """At most a unit's pictures are decoded at any time."""
    alive, most = [], []
    fit = encode.fit

    def spy(*arguments: Any) -> Any:
        import weakref

        pixels = fit(*arguments)
        alive.append(weakref.ref(pixels.values))
        most.append(sum(ref() is not None for ref in alive))
        return pixels

    monkeypatch.setattr(encode, "fit", spy)
    captioned_folder(photos / "more", [(128, 128)] * 20)
    report_of(data_config())
    assert len(most) == 26
    assert max(most) <= 2


def test_nothing_to_prepare(data_config) -> None:
    options = {"gan__enabled": "false", "data__real_images": None, "data__text": "online"}
    with pytest.raises(ValueError, match=r"data.cache is .* has no effect, because data.text"):
        data_config(**options)
    with pytest.raises(ValueError, match=r"data.cache is not set; name the folder to fill"):
        prepare.prepare(data_config(data__cache=None))


def test_the_command(data_config, photos, prompts, tmp_path, capsys) -> None:
    argv = ["prepare", "--preset", "demo", "--data.prompts", str(prompts)]
    argv += ["--data.real_images", str(photos), "--data.cache", str(tmp_path / "cache")]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "cache" / "report.json")
    assert printed[:4] == ["prompts: 7", "pictures: 6", "  128x128: 3", "  160x96: 3"]
    (photos / "000.txt").unlink()
    assert cli.main([*argv, "--strict"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("dmd2: error: Some samples cannot be used (1 no caption)")


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    argv = ["prepare", "--preset", "demo", "--data.prompts", str(tmp_path / "p.parquet")]
    assert cli.main([*argv, "--data.cache", str(tmp_path / "cache")]) == 2
    assert "pyarrow, which reads this kind of data, is not installed; install it: pip install " in (
        capsys.readouterr().err
    )
