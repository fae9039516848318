"""`dmd2 prepare` and training from its cache, on real files and the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from train_lora import cli, model_setup, prepare, trainer
from train_lora.config import Config
from train_lora.data import encode, training_data
from train_lora.data.sizes import Size
from train_lora.data.training_data import TrainingData, load_training_data
from train_lora.models.components import Components
from train_lora.models.roles import LoraSpec, SharedUNet

from .picture_files import captioned_folder, picture_bytes
from .tiny import demo_config, random_components

WIDE, SQUARE = "160x96", "128x128"
PICTURES = [(128, 128), (320, 192), (200, 200), (160, 96), (300, 300), (330, 200)]
"""Three squares and three of about 5:3."""


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch, shared_components: Components) -> None:
    """The embedded teacher's place is taken by the same networks with random weights."""
    PartialState(cpu=True)
    monkeypatch.setattr(model_setup, "load_model", lambda config, device: shared_components)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return captioned_folder(tmp_path / "photos", PICTURES)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a scene number {number}" for number in range(7)))
    return path


@pytest.fixture
def config(tmp_path: Path, photos: Path, prompts: Path):
    def make(**overrides: Any) -> Config:
        paths = {"data__prompts": prompts, "data__real_images": photos}
        options = {"data__cache": tmp_path / "cache", "training__batch_size": 3}
        given = paths | options | overrides
        return demo_config(tmp_path / "run", **{k: v for k, v in given.items() if v is not None})

    return make


def report_of(config: Config, **options: Any) -> dict[str, Any]:
    return json.loads(prepare.prepare(config, **options).read_text("utf-8"))


def all_batches(data: TrainingData, steps: int = 8) -> list[Any]:
    per_step = data.samples_per_step
    return [data.batch(first=s * per_step, size=per_step, seed=1) for s in range(steps)]


def test_the_cache_gives_the_batches_of_training_without_one(config, shared_components) -> None:
    """Same order, same sizes; values to half precision, whose step is 1/1024 of the value."""
    report = report_of(config())
    assert report["prompts"] == 7
    assert report["buckets"] == {SQUARE: 3, WIDE: 3}
    cached = load_training_data(config(), shared_components)
    direct = load_training_data(config(data__cache=None), shared_components)
    assert list(cached.captions) == list(direct.captions)
    assert [bucket.size for bucket in cached.buckets] == [Size(128, 128), Size(160, 96)]
    shapes = set()
    for one, other in zip(all_batches(cached), all_batches(direct), strict=True):
        shapes.add(tuple(one.real.latents.shape))
        for a, b in (
            (one.real.latents, other.real.latents),
            (one.real.condition.hidden, other.real.condition.hidden),
            (one.real.condition.pooled, other.real.condition.pooled),
            (one.condition.hidden, other.condition.hidden),
        ):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert torch.equal(one.real.condition.time_ids, other.real.condition.time_ids)
    assert shapes == {(3, 4, 16, 16), (3, 4, 12, 20)}


def test_size_ids_follow_the_bucket_and_student_and_real_agree(config, shared_components) -> None:
    report_of(config())
    batches = all_batches(load_training_data(config(), shared_components))
    for batch in batches:
        height, width = (8 * side for side in batch.real.latents.shape[2:])
        expected = torch.tensor([[height, width, 0, 0, height, width]] * 3).float()
        assert torch.equal(batch.condition.time_ids, expected)
        assert torch.equal(batch.real.condition.time_ids, expected)
        assert batch.condition.latent_shape() == tuple(batch.real.latents.shape)


def test_size_ids_of_the_images_tell_original_size_and_crop(config, shared_components) -> None:
    settings = config(data__size_ids="image")
    report_of(settings)
    rows = set()
    for batch in all_batches(load_training_data(settings, shared_components)):
        assert torch.equal(batch.condition.time_ids, batch.real.condition.time_ids)
        assert batch.condition.latent_shape() == tuple(batch.real.latents.shape)
        rows |= {tuple(row) for row in batch.real.condition.time_ids.int().tolist()}
    # 330 x 200 scaled to 160 x 97: of 97 rows one is cut, below, so the top stays at 0.
    assert rows == {
        (128, 128, 0, 0, 128, 128),
        (200, 200, 0, 0, 128, 128),
        (300, 300, 0, 0, 128, 128),
        (192, 320, 0, 0, 96, 160),
        (96, 160, 0, 0, 96, 160),
        (200, 330, 0, 0, 96, 160),
    }


def test_text_online_gives_the_embeddings_of_text_cached(config, shared_components) -> None:
    cached = load_training_data(config(data__cache=None), shared_components)
    online_config = config(data__text="online")
    report = report_of(online_config)
    assert report["prompts"] == 0
    online = load_training_data(online_config, shared_components)
    assert online.needs_text_encoders
    assert not cached.needs_text_encoders
    for one, other in zip(all_batches(online, 4), all_batches(cached, 4), strict=True):
        # The same encoders on other batches of captions: rounding of float32 alone.
        torch.testing.assert_close(
            one.condition.hidden, other.condition.hidden, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            one.real.condition.pooled, other.real.condition.pooled, rtol=1e-5, atol=1e-5
        )
        assert torch.equal(one.condition.time_ids, other.condition.time_ids)


def test_bad_samples_are_left_out_counted_and_listed(config, photos) -> None:
    (photos / "000.txt").unlink()
    (photos / "001.png").write_bytes(picture_bytes(1)[:300])
    (photos / "002.txt").write_text("")
    (photos / "lost.txt").write_text("where is my picture")
    small = captioned_folder(photos / "small", [(60, 60)])
    report = report_of(config())
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


def test_strict_fails_after_everything_else_was_encoded(config, photos, tmp_path) -> None:
    (photos / "000.txt").unlink()
    with pytest.raises(ValueError, match=r"Some samples cannot be used \(1 no caption\).*--strict"):
        prepare.prepare(config(), strict=True)
    assert list((tmp_path / "cache").glob("pictures-*"))
    assert report_of(config())["pictures"] == 5


def test_no_usable_picture_stops_with_the_reasons(config, photos) -> None:
    for file in photos.glob("*.txt"):
        file.write_text("")
    with pytest.raises(ValueError, match=r"no usable picture \(6 empty caption\); .*report.json"):
        prepare.prepare(config())


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
    config, tmp_path, monkeypatch, small_units, shared_components
) -> None:
    whole = config(data__cache=tmp_path / "whole")
    report = report_of(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(config())
    (tmp_path / "cache" / ".pictures-000001.safetensors.99.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"is incomplete, its preparation was stopped; run dmd2"):
        load_training_data(config(), shared_components)
    written = stop_after(monkeypatch, 1000)
    assert report_of(config()) == report
    assert len(written) == 6 - 4  # 3 shards of prompts, 3 of pictures
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    load_training_data(config(), shared_components)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_changed_caption_costs_its_own_shard_only(
    config, photos, monkeypatch, small_units, tmp_path, shared_components
) -> None:
    report_of(config())
    written = stop_after(monkeypatch, 1000)
    report_of(config())
    assert written == []
    (photos / "003.txt").write_text("a caption written anew")
    (photos / "005.txt").unlink()
    (photos / "005.png").unlink()
    (photos / "004.txt").unlink()
    (photos / "004.png").unlink()
    assert report_of(config())["pictures"] == 4
    assert [path.name for path in written] == ["pictures-000001.safetensors"]
    assert not (tmp_path / "cache" / "pictures-000002.safetensors").exists()
    table = load_training_data(config(training__batch_size=2), shared_components)
    captions = [c for bucket in table.buckets for c in bucket.images.captions(range(2))]
    assert "a caption written anew" in captions


def test_a_damaged_shard_is_named_and_made_anew(config, tmp_path, shared_components) -> None:
    report_of(config())
    before = contents(tmp_path / "cache")
    shard = tmp_path / "cache" / "pictures-000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pictures-000000.safetensors is missing or damaged; run"):
        load_training_data(config(), shared_components)
    report_of(config())
    assert contents(tmp_path / "cache") == before


def test_a_cache_of_another_model_is_refused(config, monkeypatch, tmp_path) -> None:
    report_of(config())
    before = contents(tmp_path / "cache")
    other = random_components(seed=5)
    monkeypatch.setattr(model_setup, "load_model", lambda config, device: other)
    message = r"cache' was prepared with another model \(tiny, \w{12}\) than tiny \(\w{12}\)"
    with pytest.raises(ValueError, match=message):
        load_training_data(config(), other)
    with pytest.raises(ValueError, match=message):
        prepare.prepare(config())
    assert contents(tmp_path / "cache") == before


def test_other_text_encoders_under_the_same_unet_are_noticed(config, shared_components) -> None:
    report_of(config())
    other = random_components(seed=5)
    fields = {n: getattr(shared_components, n) for n in shared_components.__dataclass_fields__}
    mixed = Components(**(fields | {"text_encoders": other.text_encoders}))
    with pytest.raises(ValueError, match=r"another VAE or text encoders"):
        load_training_data(config(), mixed)


def test_a_stale_cache_is_refused_with_the_setting(config, shared_components, tmp_path) -> None:
    report_of(config())
    for change, message in (
        ({"data__sizes": SQUARE}, r"prepared with data.sizes \[\], but .* \['128x128'\]"),
        ({"data__min_size_px": 32}, r"data.min_size_px none, but the configuration says 32"),
        ({"data__text": "online"}, r"data.text 'cached', but the configuration says 'online'"),
        ({"data__real_images": tmp_path / "others"}, r"data.real_images 'photos'.*'others'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_training_data(config(**change), shared_components)
    fewer = config(gan__enabled="false", data__real_images=None)  # takes less of it
    load_training_data(fewer, shared_components)


def test_a_cache_may_move_with_its_data(config, shared_components, tmp_path, photos) -> None:
    report_of(config())
    photos.rename(tmp_path / "elsewhere")
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = config(data__cache=tmp_path / "moved", data__real_images="/gone/photos")
    assert len(all_batches(load_training_data(moved, shared_components), 1)) == 1


def test_folders_that_are_no_cache_are_left_alone(config, tmp_path, shared_components) -> None:
    with pytest.raises(ValueError, match=r"cache' holds nothing yet; run dmd2 prepare with this"):
        load_training_data(config(), shared_components)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and no cache; name another"):
        prepare.prepare(config())
    assert contents(tmp_path / "cache") == {"thesis.txt": b"precious"}
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        prepare.prepare(config())


def test_a_bucket_smaller_than_a_step_is_named_or_left_out(
    config, photos, capsys, shared_components
) -> None:
    (photos / "005.txt").unlink()  # leaves two wide ones
    report_of(config())
    with pytest.raises(ValueError, match=r"takes 3 real images of one size, but 160x96 has 2; add"):
        load_training_data(config(), shared_components)
    with pytest.raises(ValueError, match=r"takes 12 .* 128x128 has 3, 160x96 has 2"):
        load_training_data(config(), shared_components, num_processes=4)
    data = load_training_data(config(data__skip_small_buckets="true"), shared_components)
    assert [str(bucket.size) for bucket in data.buckets] == [SQUARE]
    assert "Left out, with fewer real images than the 3 of an iteration: 160x96 has 2." in (
        capsys.readouterr().out
    )
    skipping = config(data__skip_small_buckets="true", training__batch_size=4)
    with pytest.raises(ValueError, match=r"takes 4 real images"):
        load_training_data(skipping, shared_components)


def test_training_without_a_cache_stops_at_the_first_bad_sample(
    config, photos, shared_components
) -> None:
    (photos / "004.txt").unlink()
    with pytest.raises(ValueError, match=r"004.png has no caption; write one into"):
        load_training_data(config(data__cache=None), shared_components)


def test_pictures_are_never_all_in_memory(config, photos, monkeypatch, small_units) -> None:
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
    report_of(config())
    assert len(most) == 26
    assert max(most) <= 2


@pytest.mark.parametrize("sizes", ["", '["128x128", "64x128"]'])
def test_the_teacher_makes_its_images_the_same_in_any_split(
    config, monkeypatch, shared_components, sizes
) -> None:
    monkeypatch.setattr("train_lora.data.teacher_images.TEACHER_STEPS", 2)
    options = {
        "data__real_images": "teacher", "data__teacher_images": 4, "training__batch_size": 2,
        **({"data__sizes": sizes} if sizes else {}),
    }  # fmt: skip
    report = report_of(config(**options))
    assert report["buckets"] == ({SQUARE: 2, "64x128": 2} if sizes else {SQUARE: 4})
    cached = load_training_data(config(**options), shared_components)
    one = {"training__batch_size": 1, "data__cache": None}
    direct = load_training_data(config(**(options | one)), shared_components)
    for bucket, other in zip(cached.buckets, direct.buckets, strict=True):
        rows = torch.arange(len(bucket.images))
        a, b = bucket.images.rows(rows)["latents"], other.images.rows(rows)["latents"]
        assert a.std() > 0.1
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        assert bucket.images.captions(rows.tolist()) == other.images.captions(rows.tolist())


def test_the_teacher_of_a_training_makes_the_same_images(
    config, monkeypatch, shared_components, components
) -> None:
    """Its UNet has its adapters already; they are off, and can be trained afterwards."""
    monkeypatch.setattr("train_lora.data.teacher_images.TEACHER_STEPS", 2)
    settings = config(
        data__real_images="teacher",
        data__teacher_images=2,
        training__batch_size=2,
        data__cache=None,
    )
    unet = SharedUNet(components.unet, {"student": LoraSpec(rank=2, alpha=2)}, seed=0)
    for weight in unet.parameters_of("student"):
        weight.data.fill_(0.1)
    latents = []
    for teacher in (None, unet):
        model = components if teacher else shared_components
        data = load_training_data(settings, model, teacher=teacher)
        latents.append(data.buckets[0].images.rows(torch.arange(2))["latents"])
    # Whether a parameter asks for gradients selects kernels, and so the last bits.
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    assert all(weight.requires_grad for weight in unet.parameters_of("student"))


def test_without_a_gan_no_images_are_needed_and_sizes_are_drawn(config, shared_components) -> None:
    options = {"gan__enabled": "false", "data__real_images": None}
    report = report_of(config(**options))
    assert report["pictures"] == 0
    square = load_training_data(config(**options), shared_components)
    assert {b.condition.latent_shape() for b in all_batches(square)} == {(3, 4, 16, 16)}
    options["data__sizes"] = '["128x128", "96x160"]'
    drawn = load_training_data(config(**options), shared_components)
    batches = all_batches(drawn, 20)
    assert {b.condition.latent_shape() for b in batches} == {(3, 4, 16, 16), (3, 4, 20, 12)}
    assert all(batch.real is None for batch in batches)


def test_nothing_to_prepare(config) -> None:
    options = {"gan__enabled": "false", "data__real_images": None, "data__text": "online"}
    with pytest.raises(ValueError, match=r"data.cache is .* has no effect, because data.text"):
        config(**options)
    with pytest.raises(ValueError, match=r"data.cache is not set; name the folder to fill"):
        prepare.prepare(config(data__cache=None))


def test_a_training_step_on_two_sizes(config, shared_components, components) -> None:
    """The whole iteration, GAN included, on a square and on a wide batch."""
    from accelerate import Accelerator

    settings = config(
        student__rank=4, critic__rank=4, validation__every=0, critic__updates_per_generator=1
    )
    report_of(settings)
    data = load_training_data(settings, shared_components)
    loop = trainer.build_trainer(settings, components, data, Accelerator(cpu=True))
    shapes = set()
    for iteration in range(8):
        batch, _ = loop._batch_and_draws(iteration, 0)
        shape = tuple(batch.real.latents.shape)
        if shape in shapes:
            continue
        shapes.add(shape)
        figures = loop.iterate(iteration)
        assert all(torch.isfinite(value).all() for value in figures.values())
    assert shapes == {(3, 4, 16, 16), (3, 4, 12, 20)}


def test_the_command(config, photos, prompts, tmp_path, capsys) -> None:
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


def test_the_demos_own_data_passes_through_a_cache(tmp_path, shared_components, monkeypatch):
    monkeypatch.setattr("train_lora.data.demo_data.demo_captions.__defaults__", (5,))
    monkeypatch.setattr("train_lora.data.demo_data.demo_samples.__defaults__", (4,))
    settings = demo_config(tmp_path / "run", data__cache=tmp_path / "cache", training__batch_size=2)
    assert report_of(settings)["buckets"] == {SQUARE: 4}
    assert len(training_data.load_training_data(settings, shared_components).prompts) == 5
