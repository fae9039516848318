"""What a run beside a teacher of classes trains on: labels, and pictures in a folder per class.

Pictures are read from their files when a batch needs them: nothing is cached, and ImageNet (1.3M
small pictures) need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Config
from ..distill import Batch, RealImages
from ..models.class_condition import ClassCondition
from ..models.components import Components
from .encode import DECODERS, Part
from .folders import picture_files
from .images import fit, open_picture
from .order import SampleOrder
from .sizes import Size
from .store import MemoryTable

if TYPE_CHECKING:
    from .store import Table

_KEY = "data.real_images"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPictures:
    """Picture files and their classes."""

    files: Sequence[Path]
    labels: Tensor
    """(N,) int64."""
    side_px: int
    min_size_px: int | None
    """`data.min_size_px`."""

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, indices: Tensor) -> Tensor:
        """The chosen pictures, (B, 3, side, side) float32 in [-1, 1]; ValueError for a file that
        cannot be used. The shorter side fills the square, the middle is kept."""
        with ThreadPoolExecutor(DECODERS) as pool:
            return torch.stack(list(pool.map(self._read, indices.tolist())))

    def _read(self, index: int) -> Tensor:
        path = self.files[index]
        picture = open_picture(path, str(path))
        return fit(picture, [Size.square(self.side_px)], str(path), self.min_size_px).scaled()


@dataclass(frozen=True, kw_only=True)
class ClassData:
    """All samples of a run, as `TrainingData`; `batch` is a pure function of position and seed."""

    prompts: Table
    """The classes that the student draws, as numbers in words: those that have pictures, or all."""
    pictures: ClassPictures | None
    """None where the run takes no real images."""
    side_px: int
    samples_per_step: int
    """Ranks x micro-batches x batch size."""
    device: torch.device
    pairs: None = field(default=None, init=False)
    needs_text_encoders: bool = field(default=False, init=False)

    @property
    def captions(self) -> Sequence[str]:
        return self.prompts.captions(range(len(self.prompts)))

    @property
    def num_real_images(self) -> int:
        return 0 if self.pictures is None else len(self.pictures)

    def batch(self, *, first: int, size: int, seed: int) -> Batch:
        """Samples `first` .. `first + size - 1` of the run, counted over all ranks and steps.

        The student's labels are an endless shuffled order of the classes, as prompts are elsewhere,
        and have nothing to do with those of the real images.
        """
        order = SampleOrder(
            num_prompts=len(self.prompts),
            bucket_weights=[self.num_real_images or 1],
            has_images=self.pictures is not None,
            samples_per_step=self.samples_per_step,
        )
        rows = order.rows(first, size, seed)
        condition = self._condition(self.prompts.rows(rows.prompts)["labels"])
        if self.pictures is None or rows.images is None:
            return Batch(condition=condition)
        real = RealImages(
            latents=self.pictures.rows(rows.images).to(self.device),
            condition=self._condition(self.pictures.labels[rows.images]),
        )
        return Batch(condition=condition, real=real)

    def _condition(self, labels: Tensor) -> ClassCondition:
        return ClassCondition(labels=labels, side_px=self.side_px).to(self.device)


def load_class_data(config: Config, components: Components, samples_per_step: int) -> ClassData:
    """ValueError for a folder that cannot be used."""
    network, pictures = components.unet.config, None
    labels = torch.arange(network.classes)
    if config.needs_real_images:
        files, of_files = class_files(Path(str(config.data.real_images)), network.classes)
        pictures = ClassPictures(
            files=files,
            labels=of_files,
            side_px=network.resolution_px,
            min_size_px=config.data.min_size_px,
        )
        labels = of_files.unique()  # a class without pictures would give its samples away
    numbers = [str(label) for label in labels.tolist()]
    return ClassData(
        prompts=MemoryTable(part=Part(columns={"labels": labels}, captions=numbers)),
        pictures=pictures,
        side_px=network.resolution_px,
        samples_per_step=samples_per_step,
        device=components.vae.device,
    )


def class_files(folder: Path, num_classes: int) -> tuple[list[Path], Tensor]:
    """All pictures below FOLDER/CLASS/ in the order of classes and names, and their classes (N,).

    Folders that are all named by numbers are those classes. Otherwise there must be one for each
    class of the network, which are counted in the order of their names (as ImageNet's n01440764,
    n01443537, ... are). Hidden folders are none.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{_KEY} is {str(folder)!r}, which is no folder; name one with a folder of pictures "
            "for each class."
        )
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if folders and all(path.name.isdecimal() for path in folders):
        classes = _numbered(folder, folders, num_classes)
    elif len(folders) != num_classes:
        raise ValueError(
            f"{_KEY} {str(folder)!r} has {len(folders)} folders, but the network has {num_classes} "
            "classes; make one folder for each class, or name the folders by the classes' numbers."
        )
    else:
        classes = dict(enumerate(folders))
    files: list[Path] = []
    labels: list[int] = []
    for number, path in sorted(classes.items()):
        found = picture_files(path)
        if not found:
            raise ValueError(f"{path} holds no picture; put some there, or remove it.")
        files += found
        labels += [number] * len(found)
    return files, torch.tensor(labels)


def _numbered(folder: Path, folders: Sequence[Path], num_classes: int) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in folders:
        number = int(path.name)
        if number >= num_classes:
            raise ValueError(
                f"{_KEY} {str(folder)!r} has a folder {path.name!r}, but the network's classes "
                f"are 0 to {num_classes - 1}; name the folders by these numbers."
            )
        if number in found:
            raise ValueError(f"{found[number]} and {path} are the same class; put them together.")
        found[number] = path
    return found
