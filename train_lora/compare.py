"""`dmd2 compare`: the same prompts and noise through several systems, as a grid and a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint_store import write_text
from .evaluate import Measures, evaluate_all
from .metrics.picture_folder import pixels, read_folder
from .output import check_output_directory
from .pictures import labelled_grid
from .render import PICTURES, RenderRequest

if TYPE_CHECKING:
    from PIL.Image import Image

TEACHER_NAME = "teacher"
GRID_FILE, TABLE_FILE = "grid.png", "table.md"
COLUMNS = 8
"""Most prompts that the grid shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A few-step LoRA in the comparison."""

    lora: str
    family: str | None = None
    """None: the file says how it is sampled."""
    steps: int | None = None
    """None: those of the file or of the family."""

    @property
    def label(self) -> str:
        name = Path(self.lora).name.removesuffix(".safetensors")
        if self.steps is not None:
            return f"{name}, {self.steps} step{'s' * (self.steps > 1)}"
        return name if self.family is None else f"{name} ({self.family})"


def compare(
    teacher: RenderRequest, students: list[Student], measures: Measures, out: Path
) -> dict[str, dict[str, float]]:
    """Figures by system; leaves pictures and metrics.json of each, grid.png and table.md in `out`.

    The students draw `teacher`'s prompts from its noise. A call that was interrupted goes on.
    """
    requests = _requests(teacher, students)
    if out.is_dir() and not any((out / name).exists() for name in requests):
        check_output_directory(out, "--out")
    found = evaluate_all(requests, measures, out)
    labels = [_teacher_label(teacher), *_labels(students)]
    figures = dict(zip(labels, found.values(), strict=True))
    folders = dict(zip(labels, (out / name / PICTURES for name in found), strict=True))
    if os.environ.get("RANK", "0") != "0":
        return figures
    _grid(folders, teacher).save(out / GRID_FILE)
    table = table_of(figures)
    write_text(out / TABLE_FILE, table)
    print(table, end="")
    print(out / GRID_FILE, out / TABLE_FILE, sep="\n")
    return figures


def _requests(teacher: RenderRequest, students: list[Student]) -> dict[str, RenderRequest]:
    """By the name of the folder below `out`."""
    requests = {TEACHER_NAME: teacher}
    for number, student in enumerate(students, 1):
        requests[f"lora_{number}"] = replace(
            teacher,
            lora=student.lora,
            family=student.family,
            steps=student.steps,
            guidance=None,
        )
    return requests


def _labels(students: list[Student]) -> list[str]:
    """Each student's own: every run's LoRA has the same name, so equal ones are told by folders
    and, where that does not suffice, by their place."""
    names = [student.label for student in students]
    labels = [
        label if names.count(label) == 1 else f"{Path(student.lora).absolute().parent.name}/{label}"
        for label, student in zip(names, students, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{number}: {label}"
        for number, label in enumerate(labels, 1)
    ]


def _teacher_label(teacher: RenderRequest) -> str:
    from .sampling import TEACHER_STEPS

    steps = teacher.steps or TEACHER_STEPS
    return f"teacher, {steps} step{'s' * (steps > 1)}, guidance {teacher.guidance:g}"


def table_of(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a row for each system, a column for each figure."""
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in figures.items():
        cells = [f"{row[column]:.4g}" if column in row else "-" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _grid(folders: Mapping[str, Path], teacher: RenderRequest) -> Image:
    """A row for each system: the first picture of the first prompts."""
    shown = range(min(COLUMNS, len(teacher.prompts)))
    rows = []
    for label, path in folders.items():
        folder = read_folder(path, "--out")
        images = [pixels(folder.open(i * teacher.per_prompt)) for i in shown]
        rows.append((label, _scaled(torch.stack(images))))
    return labelled_grid(rows, teacher.prompts[: len(shown)])


def _scaled(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 to [-1, 1], where `pictures.to_picture` gives the same bytes back."""
    return images.float() / 127.5 - 1
