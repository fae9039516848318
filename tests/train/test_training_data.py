"""What training reads: the same batches from a cache and without one, in sizes, with their ids."""

from __future__ import annotations

import pytest
import torch

from train_lora import trainer
from train_lora.data import training_data
from train_lora.data.sizes import Size
from train_lora.data.training_data import load_training_data
from train_lora.models.roles import LoraSpec, SharedUNet

from .prepared import SQUARE, WIDE, all_batches, report_of
from .tiny import demo_config

pytestmark = pytest.mark.usefixtures("tiny_model")


def test_the_cache_gives_the_batches_of_training_without_one(
    data_config, shared_components
) -> None:
    """Same order, same sizes; values to half precision, whose step is 1/1024 of the value."""
    report = report_of(data_config())
    assert report["prompts"] == 7
    assert report["buckets"] == {SQUARE: 3, WIDE: 3}
    cached = load_training_data(data_config(), shared_components)
    direct = load_training_data(data_config(data__cache=None), shared_components)
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


def test_size_ids_follow_the_bucket_and_student_and_real_agree(
    data_config, shared_components
) -> None:
    report_of(data_config())
    batches = all_batches(load_training_data(data_config(), shared_components))
    for batch in batches:
        height, width = (8 * side for side in batch.real.latents.shape[2:])
        expected = torch.tensor([[height, width, 0, 0, height, width]] * 3).float()
        assert torch.equal(batch.condition.time_ids, expected)
        assert torch.equal(batch.real.condition.time_ids, expected)
        assert batch.condition.latent_shape() == tuple(batch.real.latents.shape)


def test_size_ids_of_the_images_tell_original_size_and_crop(data_config, shared_components) -> None:
    settings = data_config(data__size_ids="image")
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


def test_text_online_gives_the_embeddings_of_text_cached(data_config, shared_components) -> None:
    cached = load_training_data(data_config(data__cache=None), shared_components)
    online_config = data_config(data__text="online")
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


def test_a_bucket_smaller_than_a_step_is_named_or_left_out(
    data_config, photos, capsys, shared_components
) -> None:
    (photos / "005.txt").unlink()  # leaves two wide ones
    report_of(data_config())
    with pytest.raises(ValueError, match=r"takes 3 real images of one size, but 160x96 has 2; add"):
        load_training_data(data_config(), shared_components)
    with pytest.raises(ValueError, match=r"takes 12 .* 128x128 has 3, 160x96 has 2"):
        load_training_data(data_config(), shared_components, num_processes=4)
    data = load_training_data(data_config(data__skip_small_buckets="true"), shared_components)
    assert [str(bucket.size) for bucket in data.buckets] == [SQUARE]
    assert "Left out, with fewer real images than the 3 of an iteration: 160x96 has 2." in (
        capsys.readouterr().out
    )
    skipping = data_config(data__skip_small_buckets="true", training__batch_size=4)
    with pytest.raises(ValueError, match=r"takes 4 real images"):
        load_training_data(skipping, shared_components)


def test_training_without_a_cache_stops_at_the_first_bad_sample(
    data_config, photos, shared_components
) -> None:
    (photos / "004.txt").unlink()
    with pytest.raises(ValueError, match=r"004.png has no caption; write one into"):
        load_training_data(data_config(data__cache=None), shared_components)


@pytest.mark.parametrize("sizes", ["", '["128x128", "64x128"]'])
def test_the_teacher_makes_its_images_the_same_in_any_split(
    data_config, monkeypatch, shared_components, sizes
) -> None:
    monkeypatch.setattr("train_lora.data.teacher_images.TEACHER_STEPS", 2)
    options = {
        "data__real_images": "teacher", "data__teacher_images": 4, "training__batch_size": 2,
        **({"data__sizes": sizes} if sizes else {}),
    }  # fmt: skip
    report = report_of(data_config(**options))
    assert report["buckets"] == ({SQUARE: 2, "64x128": 2} if sizes else {SQUARE: 4})
    cached = load_training_data(data_config(**options), shared_components)
    one = {"training__batch_size": 1, "data__cache": None}
    direct = load_training_data(data_config(**(options | one)), shared_components)
    for bucket, other in zip(cached.buckets, direct.buckets, strict=True):
        rows = torch.arange(len(bucket.images))
        a, b = bucket.images.rows(rows)["latents"], other.images.rows(rows)["latents"]
        assert a.std() > 0.1
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        assert bucket.images.captions(rows.tolist()) == other.images.captions(rows.tolist())


def test_the_teacher_of_a_training_makes_the_same_images(
    data_config, monkeypatch, shared_components, components
) -> None:
    """Its UNet has its adapters already; they are off, and can be trained afterwards."""
    monkeypatch.setattr("train_lora.data.teacher_images.TEACHER_STEPS", 2)
    settings = data_config(
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


def test_without_a_gan_no_images_are_needed_and_sizes_are_drawn(
    data_config, shared_components
) -> None:
    options = {"gan__enabled": "false", "data__real_images": None}
    report = report_of(data_config(**options))
    assert report["pictures"] == 0
    square = load_training_data(data_config(**options), shared_components)
    assert {b.condition.latent_shape() for b in all_batches(square)} == {(3, 4, 16, 16)}
    options["data__sizes"] = '["128x128", "96x160"]'
    drawn = load_training_data(data_config(**options), shared_components)
    batches = all_batches(drawn, 20)
    assert {b.condition.latent_shape() for b in batches} == {(3, 4, 16, 16), (3, 4, 20, 12)}
    assert all(batch.real is None for batch in batches)


def test_a_training_step_on_two_sizes(data_config, shared_components, components) -> None:
    """The whole iteration, GAN included, on a square and on a wide batch."""
    from accelerate import Accelerator

    settings = data_config(
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


def test_the_demos_own_data_passes_through_a_cache(tmp_path, shared_components, monkeypatch):
    monkeypatch.setattr("train_lora.data.demo_data.demo_captions.__defaults__", (5,))
    monkeypatch.setattr("train_lora.data.demo_data.demo_samples.__defaults__", (4,))
    settings = demo_config(tmp_path / "run", data__cache=tmp_path / "cache", training__batch_size=2)
    assert report_of(settings)["buckets"] == {SQUARE: 4}
    assert len(training_data.load_training_data(settings, shared_components).prompts) == 5
