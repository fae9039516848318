"""The folder that `dmd2 prepare` fills: of which model and settings, whole or damaged."""

from __future__ import annotations

import pytest

from train_lora import model_setup, prepare
from train_lora.data.training_data import load_training_data
from train_lora.models.components import Components

from .prepared import SQUARE, all_batches, contents, report_of
from .tiny import random_components

pytestmark = pytest.mark.usefixtures("tiny_model")


def test_a_damaged_shard_is_named_and_made_anew(data_config, tmp_path, shared_components) -> None:
    report_of(data_config())
    before = contents(tmp_path / "cache")
    shard = tmp_path / "cache" / "pictures-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pictures-000000.safetensors is missing or damaged; run"):
        load_training_data(data_config(), shared_components)
    report_of(data_config())
    assert contents(tmp_path / "cache") == before


def test_a_cache_of_another_model_is_refused(data_config, monkeypatch, tmp_path) -> None:
    report_of(data_config())
    before = contents(tmp_path / "cache")
    other = random_components(seed=5)
    monkeypatch.setattr(model_setup, "load_model", lambda config, device: other)
    message = r"cache' was prepared with another model \(tiny, \w{12}\) than tiny \(\w{12}\)"
    with pytest.raises(ValueError, match=message):
        load_training_data(data_config(), other)
    with pytest.raises(ValueError, match=message):
        prepare.prepare(data_config())
    assert contents(tmp_path / "cache") == before


def test_other_text_encoders_under_the_same_unet_are_noticed(
    data_config, shared_components
) -> None:
    report_of(data_config())
    other = random_components(seed=5)
    fields = {n: getattr(shared_components, n) for n in shared_components.__dataclass_fields__}
    mixed = Components(**(fields | {"text_encoders": other.text_encoders}))
    with pytest.raises(ValueError, match=r"another VAE or text encoders"):
        load_training_data(data_config(), mixed)


def test_a_stale_cache_is_refused_with_the_setting(
    data_config, shared_components, tmp_path
) -> None:
    report_of(data_config())
    for change, message in (
        ({"data__sizes": SQUARE}, r"prepared with data.sizes \[\], but .* \['128x128'\]"),
        ({"data__min_size_px": 32}, r"data.min_size_px none, but the configuration says 32"),
        ({"data__text": "online"}, r"data.text 'cached', but the configuration says 'online'"),
        ({"data__real_images": tmp_path / "others"}, r"data.real_images 'photos'.*'others'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_training_data(data_config(**change), shared_components)
    fewer = data_config(gan__enabled="false", data__real_images=None)  # takes less of it
    load_training_data(fewer, shared_components)


def test_a_cache_may_move_with_its_data(data_config, shared_components, tmp_path, photos) -> None:
    report_of(data_config())
    photos.rename(tmp_path / "elsewhere")
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = data_config(data__cache=tmp_path / "moved", data__real_images="/gone/photos")
    assert len(all_batches(load_training_data(moved, shared_components), 1)) == 1


def test_folders_that_are_no_cache_are_left_alone(data_config, tmp_path, shared_components) -> None:
    with pytest.raises(ValueError, match=r"cache' holds nothing yet; run dmd2 prepare with this"):
        load_training_data(data_config(), shared_components)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and no cache; name another"):
        prepare.prepare(data_config())
    assert contents(tmp_path / "cache") == {"thesis.txt": b"precious"}
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        prepare.prepare(data_config())
