"""Buckets: SDXL's list, its scaled forms, which bucket a picture goes into and what is cut off."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from train_lora.data.images import fit
from train_lora.data.samples import BadSampleError
from train_lora.data.settings import DataConfig
from train_lora.data.sizes import Size, fill, grid_px, nearest_size, sdxl_sizes


def test_sdxls_list_is_exact_at_1024_px() -> None:
    sizes = sdxl_sizes(1024)
    assert len(sizes) == 41
    sides = {side for size in sizes for side in (size.width_px, size.height_px)}
    assert (min(sides), max(sides)) == (512, 2048)
    assert all(side % 64 == 0 for side in sides)
    for text in ("1024x1024", "832x1216", "1216x832", "896x1152", "1344x768", "512x2048"):
        assert Size.parse(text) in sizes


@pytest.mark.parametrize("resolution", [128, 256, 512, 768, 1024, 2048])
def test_scaled_lists_keep_grid_area_and_orientation(resolution: int) -> None:
    sizes, grid = sdxl_sizes(resolution), grid_px(resolution)
    assert Size.square(resolution) in sizes
    for size in sizes:
        assert size.width_px % grid == size.height_px % grid == 0
        assert 0.6 * resolution**2 < size.area_px <= resolution**2
        assert Size(size.height_px, size.width_px) in sizes
    assert min(size.aspect for size in sizes) == 1 / 4


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1024, 1024), "1024x1024"),
        ((4000, 3000), "1152x896"),
        ((3000, 4000), "896x1152"),
        ((1920, 1080), "1344x768"),
        ((1000, 9000), "512x2048"),
    ],
)
def test_a_picture_goes_to_the_nearest_aspect_ratio(picture: tuple[int, int], size: str) -> None:
    assert str(nearest_size(*picture, sdxl_sizes(1024))) == size


def test_filling_covers_the_bucket_and_cuts_the_middle_out() -> None:
    crop = fill(400, 300, Size(128, 128))
    assert (crop.width_px, crop.height_px) == (171, 128)
    assert (crop.left_px, crop.top_px) == (21, 0)
    assert crop.scale == pytest.approx(128 / 300)


def test_fit_keeps_the_middle_and_tells_original_size_and_crop() -> None:
    """Three upright stripes; the middle one fills the bucket, the cut is told in pixels."""
    picture = Image.new("RGB", (384, 128), (255, 0, 0))
    picture.paste((0, 255, 0), (128, 0, 256, 128))
    pixels = fit(picture, [Size(128, 128)], "p", None)
    assert pixels.ids == (128, 384, 0, 128, 128, 128)
    green = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 128, 128)
    assert torch.equal(pixels.scaled(), green)


def test_small_pictures_are_enlarged_only_on_request() -> None:
    sizes, small = [Size(64, 128)], Image.new("RGB", (60, 130))
    with pytest.raises(BadSampleError, match=r"60 x 130 px, smaller than its bucket 64x128") as e:
        fit(small, sizes, "p", None)
    assert e.value.reason == "too small"
    assert fit(small, sizes, "p", 60).values.shape == (3, 128, 64)
    with pytest.raises(BadSampleError, match=r"below data.min_size_px 61"):
        fit(small, sizes, "p", 61)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (("100x128",), "100x128 must have sides that are multiples of 32"),
        (("128",), "'128' is no size: write WIDTHxHEIGHT"),
        (("128x256",), "128x256 has more pixels than the square of data.resolution_px 128"),
        (("64x128", "64x128"), "name each size once"),
    ],
)
def test_sizes_are_checked(sizes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(prompts="p.txt", resolution_px=128, sizes=sizes)
