"""Units of work: a few dozen pictures or captions to latents and text embeddings.

Training without a cache encodes all units into memory; `dmd2 prepare` writes each into a file, so
that many processes share the units and a killed preparation goes on with the next.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ..models.class_condition import AnyCondition
from ..models.components import Components
from ..models.edm_teacher import encode_classes
from ..models.text import Condition, encode_prompts
from ..sampling import encode_images, vae_rows
from .images import Pixels, fit
from .samples import BadSampleError, Sample
from .sizes import Size

UNIT_PICTURES, UNIT_PROMPTS = 64, 256
T = TypeVar("T")
DECODERS = 4

PROMPTS = "prompts"
"""The part that captions without pictures are in; the parts of pictures are named by size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Encoded samples of one size: n rows in each column."""

    columns: dict[str, Tensor]
    """latents (n, 4, H/8, W/8), ids (n, 6), hidden (n, 77, width), pooled (n, width); on the CPU
    or where they were made."""
    captions: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """What a unit gives."""

    parts: dict[str, Part]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(reason, sentence) of each sample that cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece of the work that one process does."""

    stamp: Callable[[], str]
    """A text that changes when the unit's result would."""
    encode: Callable[[], Encoded]


def encode_captions(
    components: Components, captions: Sequence[str], resolution_px: int, chunk: int = 128
) -> AnyCondition:
    """`encode_prompts` in chunks; each distinct caption is encoded once. Of a model of classes the
    captions are their numbers."""
    if components.kind == "edm":
        return encode_classes(components, captions, resolution_px)
    distinct = list(dict.fromkeys(captions))
    encoded = Condition.cat(
        [
            encode_prompts(components, distinct[i : i + chunk], resolution_px, resolution_px)
            for i in range(0, len(distinct), chunk)
        ]
    )
    row = {caption: index for index, caption in enumerate(distinct)}
    return encoded[torch.tensor([row[caption] for caption in captions])]


def text_columns(condition: Condition) -> dict[str, Tensor]:
    """What is kept of a condition, off the GPU; its size ids follow the batch."""
    return {"hidden": condition.hidden.cpu(), "pooled": condition.pooled.cpu()}


def prompt_units(components: Components, captions: Sequence[str], px: int) -> Iterator[Unit]:
    """Text embeddings of the captions, in their order."""
    for piece in _pieces(captions, UNIT_PROMPTS):

        def encode(piece: list[str] = piece) -> Encoded:
            columns = text_columns(encode_captions(components, piece, px))
            return Encoded(parts={PROMPTS: Part(columns=columns, captions=piece)})

        yield Unit(stamp=lambda piece=piece: digest(piece), encode=encode)


def picture_units(
    components: Components,
    samples: Iterable[Sample],
    sizes: Sequence[Size],
    *,
    min_size_px: int | None,
    lenient: bool,
) -> Iterator[Unit]:
    """Latents of the samples. The first bad one raises its error, or, if lenient, is left out."""
    for piece in _pieces(samples, UNIT_PICTURES):

        def encode(piece: list[Sample] = piece) -> Encoded:
            return encode_pictures(
                components, piece, sizes, min_size_px=min_size_px, lenient=lenient
            )

        def stamp(piece: list[Sample] = piece) -> str:
            return digest([f"{sample.name} {sample.stamp()}" for sample in piece])

        yield Unit(stamp=stamp, encode=encode)


def encode_pictures(
    components: Components,
    samples: Sequence[Sample],
    sizes: Sequence[Size],
    *,
    min_size_px: int | None,
    lenient: bool,
) -> Encoded:
    """Read ahead by a few threads; each bucket passes the VAE as soon as a batch is full."""
    buckets: dict[Size, _Bucket] = {}
    left_out: list[tuple[str, str]] = []

    def read(sample: Sample) -> tuple[Pixels, str] | BadSampleError:
        try:
            picture, caption = sample.load()
            return fit(picture, sizes, sample.name, min_size_px), caption
        except BadSampleError as error:
            return error

    with warnings.catch_warnings(), ThreadPoolExecutor(DECODERS) as pool:
        warnings.simplefilter("ignore")  # of PIL, about odd metadata; filters are not per thread
        for outcome in pool.map(read, samples):
            if isinstance(outcome, BadSampleError):
                if not lenient:
                    raise outcome
                left_out.append((outcome.reason, str(outcome)))
                continue
            pixels, caption = outcome
            bucket = buckets.setdefault(pixels.size, _Bucket(components, pixels.size))
            bucket.add(pixels, caption)
    parts = {str(size): buckets[size].part() for size in sorted(buckets)}
    return Encoded(parts=parts, left_out=left_out)


class _Bucket:
    """Pictures of one size on their way through the VAE."""

    def __init__(self, components: Components, size: Size) -> None:
        self.components = components
        self.batch = vae_rows(size.height_px, size.width_px)
        self.waiting: list[Pixels] = []
        self.latents: list[Tensor] = []
        self.ids: list[tuple[int, ...]] = []
        self.captions: list[str] = []

    def add(self, pixels: Pixels, caption: str) -> None:
        self.waiting.append(pixels)
        self.ids.append(pixels.ids)
        self.captions.append(caption)
        if len(self.waiting) == self.batch:
            self._encode()

    def _encode(self) -> None:
        images = torch.stack([pixels.scaled() for pixels in self.waiting])
        device = self.components.vae.device
        self.latents.append(encode_images(self.components, images.to(device)).cpu())
        self.waiting.clear()

    def part(self) -> Part:
        if self.waiting:
            self._encode()
        columns = {"latents": torch.cat(self.latents), "ids": torch.tensor(self.ids).float()}
        return Part(columns=columns, captions=self.captions)


def with_text(components: Components, encoded: Encoded, px: int) -> Encoded:
    """The text embeddings of the captions beside the latents."""
    parts = {}
    for name, part in encoded.parts.items():
        columns = text_columns(encode_captions(components, part.captions, px))
        parts[name] = Part(columns=part.columns | columns, captions=part.captions)
    return Encoded(parts=parts, left_out=encoded.left_out)


def digest(texts: Iterable[str]) -> str:
    """sha256 of the texts and where each ends."""
    result = hashlib.sha256()
    for text in texts:
        content = text.encode()
        result.update(len(content).to_bytes(8, "big") + content)
    return result.hexdigest()


def _pieces(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while piece := list(islice(iterator, size)):
        yield piece
