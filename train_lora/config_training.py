"""The options of [training]: how long, in what batches, with which optimizer and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import LARGEST_SEED, Section, number


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Section):
    section: ClassVar[str] = "training"

    objective: Literal["dmd2", "dmd"] = "dmd2"
    """"dmd": that of the first paper (arXiv 2311.18828), with a regression loss on the teacher's
    pairs in every update of the student. What is not set with it becomes that paper's:
    sampling.steps 1, gan.enabled false, critic.updates_per_generator 1."""

    iterations: int = number(16_000, low=1)
    """Number of iterations, each with one critic update but for those of the regression."""

    continue_from: str | None = None
    """An earlier run's folder (its best checkpoint, or else its newest), or one of its checkpoints,
    RUN/checkpoints/000500: this new run starts from that student, its average and that critic;
    "none": from the teacher."""

    batch_size: int = number(4, low=1)
    """Images in one forward pass."""

    gradient_accumulation_steps: int = number(1, low=1)
    """Batches whose gradients are averaged for one update: the global batch is the number of
    processes x `batch_size` x this, and only its size, not its parts, decides what is learnt."""

    seed: int = number(0, low=0, high=LARGEST_SEED)
    """Seed of everything random in training; the same seed gives the same LoRA file."""

    weight_decay: float = number(0.01, low=0, high=1)
    """AdamW's weight decay, for student, critic and head."""

    betas: tuple[float, float] = number((0.9, 0.999), low=0, high=1, open_high=True)
    """AdamW's two decay rates; `critic.betas` may differ."""

    max_grad_norm: float = number(10.0, low=0, open_low=True)
    """Gradients are scaled down to this norm, for student and critic apart."""

    ema_decay: float = number(0.99, low=0, high=1, open_high=True)
    """Decay, for each student update, of the averaged student that is exported; 0: no averaging."""

    learning_rate_decay: float = number(0.0, low=0, high=1)
    """Share of the iterations, the last ones, over which every learning rate falls to zero in a
    straight line; 0: they stay as they are (the paper)."""

    max_nonfinite_in_a_row: int = number(10, low=1)
    """Updates of student or critic in a row that may be skipped, because a loss or gradient is not
    finite, before the run stops; 1: stop at the first."""

    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the networks' forward passes; losses and LoRA weights are float32 either way."""

    gradient_checkpointing: bool = True
    """Whether activations are computed again in the backward pass: less memory, but slower."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with float32 states, or with 8-bit ones (bitsandbytes): a quarter of their memory."""

    compile: bool = False
    """Whether torch.compile makes the transformer blocks faster; the first iterations take
    minutes longer."""
