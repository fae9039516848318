"""What a run trains on: prompts and real images, from memory or a cache, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dmd2_core import derived_seed

from ..config import Config
from ..config_classes import has_classes
from ..distill import Batch, Pairs, RealImages
from ..models.components import Components
from ..models.roles import SharedUNet
from ..models.text import LATENT_PX, Condition, encode_prompts, size_ids
from .cache import open_cache, open_pairs
from .class_folders import ClassData, load_class_data
from .demo_data import DEMO, check_demo_size, demo_captions, demo_samples
from .encode import Part, Unit, encode_captions, picture_units, text_columns
from .order import PAIR_STREAM, SampleOrder, shuffled_indices
from .prompts import read_prompts
from .sizes import Size, sdxl_sizes
from .sources import open_samples
from .store import MemoryTable, Table
from .teacher_images import teacher_units

__all__ = ["TrainingData", "encode_captions", "load_training_data"]

ENDLESS_STEP = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A training size and its real images."""

    size: Size
    images: Table | None
    """None where the run takes no real images."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """All samples of a run; `batch` is a pure function of position and seed."""

    prompts: Table
    buckets: Sequence[Bucket]
    samples_per_step: int
    """Ranks x micro-batches x batch size: all of a step's samples have one size."""
    device: torch.device
    encode_text: Callable[[list[str]], Condition] | None = None
    """How captions are encoded during training; None where the tables hold their embeddings."""
    images_tell_their_size: bool = False
    """`data.size_ids = "image"`."""
    pairs: Table | None = None
    """The teacher's (noise, image) pairs, all of one size; None where the run takes none."""

    @property
    def captions(self) -> Sequence[str]:
        """The training prompts in their own order."""
        return self.prompts.captions(range(len(self.prompts)))

    @property
    def num_real_images(self) -> int:
        return sum(0 if bucket.images is None else len(bucket.images) for bucket in self.buckets)

    @property
    def needs_text_encoders(self) -> bool:
        """Whether `batch` calls the text encoders; otherwise they may leave the device."""
        return self.encode_text is not None

    @property
    def order(self) -> SampleOrder:
        tables = [bucket.images for bucket in self.buckets]
        return SampleOrder(
            num_prompts=len(self.prompts),
            bucket_weights=[1 if images is None else len(images) for images in tables],
            has_images=tables[0] is not None,
            samples_per_step=self.samples_per_step,
        )

    def batch(self, *, first: int, size: int, seed: int) -> Batch:
        """Samples `first` .. `first + size - 1` of the run, counted over all ranks and steps.

        They must be of one step: first // samples_per_step. All have the size of its bucket.
        """
        rows = self.order.rows(first, size, seed)
        bucket = self.buckets[rows.bucket]
        ids = size_ids(size, bucket.size.height_px, bucket.size.width_px)
        if bucket.images is None or rows.images is None:
            return Batch(condition=self._condition(self.prompts, rows.prompts, ids))
        columns = bucket.images.rows(rows.images)
        if self.images_tell_their_size:
            # The student is told the same: else the discriminator could go by the ids alone.
            ids = columns["ids"]
        real = RealImages(
            latents=columns["latents"].to(self.device),
            condition=self._condition(bucket.images, rows.images, ids, columns),
        )
        return Batch(condition=self._condition(self.prompts, rows.prompts, ids), real=real)

    def pair_batch(self, *, first: int, size: int, seed: int) -> Pairs:
        """Pairs `first` .. `first + size - 1` of their endless order, over all ranks and steps."""
        assert self.pairs is not None
        place = derived_seed(seed, PAIR_STREAM)
        rows = shuffled_indices(len(self.pairs), first, size, place)
        columns = self.pairs.rows(rows)
        height, width = columns["latents"].shape[2:]
        ids = size_ids(size, LATENT_PX * height, LATENT_PX * width)
        return Pairs(
            noise=columns["noise"].to(self.device),
            latents=columns["latents"].to(self.device),
            condition=self._condition(self.pairs, rows, ids, columns),
        )

    def _condition(
        self, table: Table, rows: Tensor, ids: Tensor, columns: dict[str, Tensor] | None = None
    ) -> Condition:
        if self.encode_text is not None:
            return replace(
                self.encode_text(table.captions(rows.tolist())), time_ids=ids.to(self.device)
            )
        columns = table.rows(rows) if columns is None else columns
        return Condition(hidden=columns["hidden"], pooled=columns["pooled"], time_ids=ids).to(
            self.device
        )

    @classmethod
    def in_memory(
        cls,
        *,
        captions: Sequence[str],
        condition: Condition,
        real: RealImages | None = None,
    ) -> Self:
        """Samples that are encoded already, all of one size: where a step ends does not matter."""
        _, _, height, width = condition.latent_shape()
        columns, images = text_columns(condition), None
        if real is not None:
            parts = text_columns(real.condition) | {
                "latents": real.latents,
                "ids": real.condition.time_ids,
            }
            images = MemoryTable(part=Part(columns=parts, captions=[""] * len(real.latents)))
        return cls(
            prompts=MemoryTable(part=Part(columns=columns, captions=list(captions))),
            buckets=[Bucket(size=Size(8 * width, 8 * height), images=images)],
            samples_per_step=ENDLESS_STEP,
            device=condition.hidden.device,
        )


def load_training_data(
    config: Config,
    components: Components,
    *,
    num_processes: int = 1,
    teacher: SharedUNet | None = None,
) -> TrainingData | ClassData:
    """Read, check and, without a cache, encode what `config.data` names.

    `teacher`: what draws the images of `real_images = "teacher"`; None: `components.unet` alone.
    ValueError for what cannot be used: unlike `dmd2 prepare`, this stops at the first bad sample.
    """
    settings, training = config.data, config.training
    per_step = training.batch_size * training.gradient_accumulation_steps * num_processes
    if has_classes(config):
        return load_class_data(config, components, per_step)
    if settings.cache is None:
        check_sources(config)
    pairs = open_pairs(config, components) if config.needs_pairs else None
    tables: dict[Size, Table] = {}
    if settings.cache is not None:
        cached, pictures = open_cache(config, components)
        tables.update(pictures)
        prompts: Table = cached or _text_only(read_training_prompts(config))
    else:
        captions = read_training_prompts(config)
        prompts = _text_only(captions) if settings.text == "online" else _encoded(
            config, components, captions
        )  # fmt: skip
        if config.needs_real_images:
            tables.update(_pictures(config, components, captions, teacher))
    if config.needs_real_images:
        tables = _large_enough(tables, per_step, skip=settings.skip_small_buckets)
        buckets = [Bucket(size=size, images=tables[size]) for size in sorted(tables)]
    else:
        buckets = [Bucket(size=size, images=None) for size in drawn_sizes(config)]
    px = settings.resolution_px
    online = settings.text == "online"
    return TrainingData(
        prompts=prompts,
        buckets=buckets,
        samples_per_step=per_step,
        device=components.vae.device,
        encode_text=(lambda texts: encode_prompts(components, texts, px, px)) if online else None,
        images_tell_their_size=settings.size_ids == "image",
        pairs=pairs,
    )


def read_training_prompts(config: Config) -> list[str]:
    return demo_captions() if config.data.prompts == DEMO else read_prompts(config.data)


def check_sources(config: Config) -> None:
    """ValueError for real images that are not there or not of a known kind: cheap, at the start."""
    settings = config.data
    if not config.needs_real_images or settings.real_images == "teacher":
        return
    if settings.real_images == DEMO:
        check_demo_size(settings, picture_sizes(config))
    else:
        open_samples(settings)


def picture_sizes(config: Config) -> tuple[Size, ...]:
    """The buckets that real images are sorted into."""
    sizes = tuple(Size.parse(text) for text in config.data.sizes)
    return sizes or sdxl_sizes(config.data.resolution_px)


def drawn_sizes(config: Config) -> tuple[Size, ...]:
    """The sizes of training without real images, and of those that the teacher makes."""
    sizes = tuple(sorted(Size.parse(text) for text in config.data.sizes))
    return sizes or (Size.square(config.data.resolution_px),)


def real_image_units(
    config: Config,
    components: Components,
    captions: Sequence[str],
    *,
    lenient: bool,
    teacher: SharedUNet | None = None,
) -> Iterator[Unit]:
    """The work that `data.real_images` asks for; `captions`: the training prompts."""
    settings = config.data
    if settings.real_images == "teacher":
        return teacher_units(config, components, captions, drawn_sizes(config), teacher)
    sizes = picture_sizes(config)
    samples = demo_samples() if settings.real_images == DEMO else open_samples(settings)
    return picture_units(
        components, samples, sizes, min_size_px=settings.min_size_px, lenient=lenient
    )


def _text_only(captions: list[str]) -> MemoryTable:
    return MemoryTable(part=Part(columns={}, captions=captions))


def _encoded(config: Config, components: Components, captions: list[str]) -> MemoryTable:
    condition = encode_captions(components, captions, config.data.resolution_px)
    return MemoryTable(part=Part(columns=text_columns(condition), captions=captions))


def _pictures(
    config: Config,
    components: Components,
    captions: Sequence[str],
    teacher: SharedUNet | None,
) -> dict[Size, MemoryTable]:
    found: dict[str, list[Part]] = {}
    units = real_image_units(config, components, captions, lenient=False, teacher=teacher)
    for unit in units:
        for name, part in unit.encode().parts.items():
            found.setdefault(name, []).append(part)
    tables = {}
    for name, parts in found.items():
        table = MemoryTable.joined(parts)
        if config.data.text == "cached":
            text = encode_captions(components, table.part.captions, config.data.resolution_px)
            columns = table.part.columns | text_columns(text)
            table = MemoryTable(part=Part(columns=columns, captions=table.part.captions))
        tables[Size.parse(name)] = table
    return tables


def _large_enough(tables: dict[Size, Table], per_step: int, *, skip: bool) -> dict[Size, Table]:
    """Without the buckets that cannot fill one iteration: they stop the run unless `skip`."""
    small = Counter({size: len(table) for size, table in tables.items() if len(table) < per_step})
    if not tables:
        raise ValueError("data.real_images holds no picture; put captioned pictures there.")
    listed = ", ".join(f"{size} has {count}" for size, count in sorted(small.items()))
    if small and (not skip or len(small) == len(tables)):
        raise ValueError(
            f"An iteration takes {per_step} real images of one size, but {listed}; add pictures of "
            "that shape, lower training.batch_size or training.gradient_accumulation_steps, name "
            "fewer data.sizes"
            + ("." if skip else ", or leave such buckets out with data.skip_small_buckets = true.")
        )
    if small:
        print(f"Left out, with fewer real images than the {per_step} of an iteration: {listed}.")
    return {size: table for size, table in tables.items() if size not in small}
