"""Grids of pictures."""

from __future__ import annotations

import torch

from train_lora.pictures import GAP_PX, LABEL_PX, labelled_grid, to_picture


def test_every_picture_is_at_its_place_below_captions_and_labels() -> None:
    images = torch.rand(2, 3, 3, 40, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [("first", images[0]), ("second", images[1])]
    plain, captioned = labelled_grid(rows), labelled_grid(rows, ["a red ring", "b", "c"])
    header_px = captioned.height - plain.height
    assert header_px > 0
    assert captioned.width == plain.width
    for r in range(2):
        for i in range(3):
            left = GAP_PX + i * (64 + GAP_PX)
            top = header_px + r * (LABEL_PX + 40 + GAP_PX) + LABEL_PX
            cut = captioned.crop((left, top, left + 64, top + 40))
            assert cut.tobytes() == to_picture(images[r, i]).tobytes()
    # The caption above the first column leaves ink; a blank header would have none.
    assert captioned.crop((0, 0, 64, header_px)).convert("L").getextrema()[0] < 128


def test_a_label_longer_than_its_pictures_is_shown_whole() -> None:
    image = torch.zeros(1, 3, 8, 8)
    short, long = (labelled_grid([(label, image)]) for label in ("a", "teacher, 50 steps"))
    assert short.width == 8 + 2 * GAP_PX
    ink = long.crop((8 + 2 * GAP_PX, 0, long.width, LABEL_PX)).convert("L")
    assert ink.getextrema()[0] < 128
    assert long.crop((long.width - 2, 0, *long.size)).convert("L").getextrema() == (255, 255)
