"""The options of [data]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..config_section import Section, number, show_value
from .sizes import Size, grid_px

CLASSES = "classes"
"""`data.prompts` beside a teacher that is told class labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    section: ClassVar[str] = "data"

    prompts: str
    """Training captions: a .txt file with one on each line, a .jsonl, .csv, .tsv or .parquet file,
    a folder that datasets.save_to_disk wrote, hub:OWNER/NAME for a dataset of the Hugging Face hub,
    or "demo" for those of drawn scenes. "classes" beside an EDM teacher (docs/imagenet.md), which
    is told class numbers."""

    real_images: str | None = None
    """Real images for the GAN loss: a folder of pictures with .txt captions beside them or with a
    metadata.jsonl, WebDataset .tar files, .parquet files, a folder that datasets.save_to_disk
    wrote, hub:OWNER/NAME, "teacher" to make them with the teacher, or "demo" for drawn scenes.
    With `prompts` "classes": a folder with a folder of pictures for each class. Needed unless the
    GAN is off and backward simulation is on."""

    prompt_column: str | None = None
    """Column of `prompts` that holds the caption; "none": text, caption or prompt, the first
    there is."""

    caption_column: str | None = None
    """Column of `real_images` that holds the caption; "none": text, caption or prompt."""

    image_column: str | None = None
    """Column of `real_images` that holds the picture; "none": image, jpg, jpeg, png or webp."""

    split: str = "train"
    """Which split of a Hugging Face dataset is read."""

    stream: bool = False
    """Whether a dataset of the hub is read while it downloads, without a copy on disk."""

    resolution_px: int = number(1024, low=8, high=4096)
    """Width and height of the square picture that the model is made for, a multiple of 64; with
    the GAN a power of two from 128 on. Of an EDM teacher, its own: 64 for ImageNet."""

    sizes: tuple[str, ...] = ()
    """Buckets: the sizes, as WIDTHxHEIGHT, that real images are sorted into by aspect ratio; empty:
    SDXL's list, scaled to `resolution_px`. Where no real images are sorted, the training sizes,
    drawn evenly; empty: the square."""

    size_ids: Literal["bucket", "image"] = "bucket"
    """What SDXL's size conditioning says: the bucket's size, uncropped, as at inference, or each
    real image's original size and crop (student samples of the batch are then told the same)."""

    min_size_px: int | None = number(None, low=1, high=16384)
    """Real images whose shorter side is smaller are not used; "none": those that would have to be
    enlarged to fill their bucket."""

    skip_small_buckets: bool = False
    """Whether a bucket with fewer real images than an iteration takes is left out, with a notice,
    or stops the run."""

    teacher_images: int = number(1024, low=1)
    """How many images the teacher makes where `real_images` is "teacher"."""

    text: Literal["cached", "online"] = "cached"
    """Whether text embeddings are computed once, beforehand, or during training: "online" for
    prompt sets too large to keep (about 0.3 MB a caption for SDXL)."""

    cache: str | None = None
    """Folder that `dmd2 prepare` fills with latents and text embeddings and `dmd2 train` reads;
    "none": everything is encoded at the start of training and held in memory."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.resolution_px % 64 and self.prompts != CLASSES:
            nearest = max(64, round(self.resolution_px / 64) * 64)
            raise ValueError(
                f"data.resolution_px is {self.resolution_px}; set it to a multiple of 64, "
                f"such as {nearest}."
            )
        grid, found = grid_px(self.resolution_px), f"data.sizes is {show_value(self.sizes)}"
        for text in self.sizes:
            try:
                size = Size.parse(text)
            except ValueError as error:
                raise ValueError(f"{found}; {error}.") from error
            if size.width_px % grid or size.height_px % grid:
                raise ValueError(f"{found}; {text} must have sides that are multiples of {grid}.")
            if size.area_px > self.resolution_px**2:
                raise ValueError(
                    f"{found}; {text} has more pixels than the square of data.resolution_px "
                    f"{self.resolution_px}; take a smaller size or raise data.resolution_px."
                )
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"{found}; name each size once.")
