"""The options of what a run writes. None of them changes the weights that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import LARGEST_SEED, Section, number, show_value


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Section):
    section: ClassVar[str] = "validation"

    every: int = number(500, low=0)
    """Iterations between two grids of validation images; 0: none."""

    prompts: tuple[str, ...] = ()
    """Captions to draw; empty: the first `num_prompts` of the training captions."""

    num_prompts: int = number(8, low=1, high=64)
    """How many training captions to draw."""

    images_per_prompt: int = number(2, low=2, high=16)
    """Pictures of each prompt, from different noise: figures of variety need two. The teacher draws
    them once for a run, in 50 guided steps each."""

    seed: int = number(0, low=0, high=LARGEST_SEED)
    """Seed of the validation noise, the same at every grid."""

    best: Literal["statistics_distance", "picture_distance", "diversity_gap", "none"] = (
        "statistics_distance"
    )
    """The validation figure by which the best checkpoint is kept for good, lowest first; see
    docs/watching.md. "none": none is."""

    panels: bool = True
    """Whether what teacher and critic see in noised samples of the student is drawn as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig(Section):
    section: ClassVar[str] = "logging"

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where figures and validation images are recorded; []: nowhere. "wandb" (Weights & Biases)
    must be installed, and sends them to its servers unless WANDB_MODE=offline."""

    project: str = "dmd2"
    """The Weights & Biases project that the run belongs to."""

    every: int = number(10, low=1)
    """Iterations between two records of the figures, which are averaged over them."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(
                f"logging.trackers is {show_value(self.trackers)}; name each tracker once."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    section: ClassVar[str] = "checkpoint"

    every: int = number(500, low=0)
    """Iterations between two checkpoints; 0: only at the end and at a stop (Ctrl-C, SIGTERM),
    which save in any case."""

    keep_last: int = number(2, low=1)
    """The newest checkpoints to keep; older ones are removed."""

    keep_every: int = number(0, low=0)
    """Checkpoints at multiples of this many iterations are never removed; 0: none is so kept."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.keep_every and (not self.every or self.keep_every % self.every):
            remedy = f"a multiple of it, such as {self.every}" if self.every else "0"
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}, but checkpoint.every is "
                f"{self.every}; set keep_every to {remedy}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Section):
    section: ClassVar[str] = "export"

    names: Literal["sd-scripts", "diffusers"] = "sd-scripts"
    """Names in the LoRA file: sd-scripts' load everywhere, diffusers' in diffusers alone."""

    thumbnail: bool = True
    """Whether the file's metadata holds a small picture, drawn from the first training caption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig(Section):
    section: ClassVar[str] = "output"

    directory: str
    """Folder of the run: LoRA, checkpoints, logs, validation images. It must be empty or not
    exist, unless the run is resumed."""


RESULTS: tuple[type[Section], ...] = (
    OutputConfig,
    ValidationConfig,
    LoggingConfig,
    CheckpointConfig,
    ExportConfig,
)
