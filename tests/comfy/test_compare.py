"""DMD2 Compare in a running ComfyUI, and the grid that it draws."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import model_files
import pytest
import torch
from comfy_server import ComfyServer
from model_files import SIZE_PX, TinyModel
from renders import CAPTION, SEED, picture
from test_sample import NEGATIVE, Sampling

Pack = Callable[[str], ModuleType]
SIZE = {"width": SIZE_PX, "height": SIZE_PX, "seed": SEED}


def test_each_cell_is_what_the_model_gives_alone(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    student, negative = graph.model, graph.text(NEGATIVE)
    graph.load(model_files.ONE_STEP_LORA, model=graph.base)
    compare = graph.add(
        "DMD2_Compare",
        **{"clip": graph.clip, "vae": graph.vae, "model_1": student, "model_3": graph.model},
        **{"teacher": graph.base, "teacher_steps": 3, "teacher_guidance": 2.0},
        **{"prompts": f"{CAPTION}\n\n  {NEGATIVE}  \n", "label_3": "one step", **SIZE},
    )
    grid = graph.add("SaveImage", images=compare[0], filename_prefix="grid").name
    alone = graph.dmd2(model=student, positive=negative, seed=SEED + 1)
    decoded = graph.add("VAEDecode", samples=alone, vae=graph.vae)
    single = graph.add("SaveImage", images=decoded[0], filename_prefix="alone").name
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    [drawn], [cell] = run.outputs[grid]["images"], run.outputs[single]["images"]
    pixels = picture(server, drawn)
    # Three columns of one picture, with a gap of 4 around each; below the last row there are two.
    assert pixels.shape[2] == 4 + 3 * (SIZE_PX + 4)
    left, bottom = 4 + (SIZE_PX + 4), pixels.shape[1] - 8
    shown = pixels[:, bottom - SIZE_PX : bottom, left : left + SIZE_PX]
    assert torch.equal(shown, picture(server, cell))


@pytest.mark.parametrize("prompts", [" \n", "a cat\n" * 17])
def test_no_prompts_and_too_many_are_refused(
    server: ComfyServer, model: TinyModel, prompts: str
) -> None:
    graph = Sampling()
    parts = {"clip": graph.clip, "vae": graph.vae, "model_1": graph.model}
    compare = graph.add("DMD2_Compare", **parts, **SIZE, prompts=prompts)
    graph.add("SaveImage", images=compare[0], filename_prefix="grid")
    run = server.run(graph.prompt)
    assert run.failed_node == "DMD2_Compare"
    assert "write one prompt on each of 1 to 16 lines" in run.error


@pytest.fixture
def grids(pack: Pack) -> ModuleType:
    return pack("nodes.picture_grid")


def test_texts_wrap_at_words_and_inside_words_that_are_too_long(grids: ModuleType) -> None:
    font = grids.ImageFont.load_default(size=12)
    text = "a photo of a fox, " + "x" * 60
    lines = grids.wrapped(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert lines[0] == "a photo of a fox,"
    assert "".join(lines[1:]) == "x" * 60
    assert grids.wrapped("  ", font, 100) == []


def test_a_system_without_fonts_still_draws(
    grids: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = grids.ImageFont.load_default(size=12).getname()
    monkeypatch.setattr(grids, "SYSTEM_FONTS", ("no_such_font.ttf",))
    assert grids.font_for(["\u72d0"], 12).getname() == own


def test_the_grid_holds_every_picture_unchanged(grids: ModuleType) -> None:
    shades = torch.arange(6).reshape(3, 2) * 51 / 255
    columns = [
        grids.Column(label="x" * 90, detail="", pictures=[torch.full((40, 64, 3), s) for s in row])
        for row in shades
    ]
    grid = grids.labelled_grid(columns, ["one", "a caption that is much longer " * 20])
    assert grid.shape[0] == 1
    assert grid.shape[2] == 4 + 3 * 68
    found = [(grid[0] == shade).all(-1).sum() for shade in shades.flatten()[1:5]]
    assert min(found) >= 40 * 64
    assert grid.max() == 1
