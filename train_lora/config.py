"""Every option of the trainer: its meaning, its default, its range.

A `Config` is frozen: config_load.py builds it once from a preset, a TOML file and the command line,
config_text.py writes it. The string under each field is its documentation (`dmd2 config --keys`).
Defaults are the paper's for an SDXL LoRA in 4 steps; the demo's own are in presets/demo.toml.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from .config_regression import RegressionConfig
from .config_results import (
    RESULTS,
    CheckpointConfig,
    ExportConfig,
    LoggingConfig,
    OutputConfig,
    ValidationConfig,
)
from .config_section import LARGEST_SEED, Section, show_value
from .config_section import number as _number
from .data.settings import DataConfig

NUM_TIMESTEPS = 1000
GAN_RESOLUTIONS_PX = (128, 256, 512, 1024, 2048, 4096)  # 4, 8, ... cells in the middle block


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"

    path: str
    """The teacher: one SDXL or SD1.5 .safetensors file, a diffusers folder, a hub id "org/name"
    (downloaded once), or "demo" (the embedded one)."""

    prediction: Literal["auto", "epsilon", "v", "v-zero-snr"] = "auto"
    """What the teacher predicts, v with or without zero terminal SNR; "auto": what its file says.
    Needed for a file that does not say it; against what the file says it is refused."""

    base_precision: Literal["auto", "bf16", "fp16", "fp32", "8bit", "4bit"] = "auto"
    """Precision in which the frozen base is stored; 8bit and 4bit need bitsandbytes. "auto": bf16
    on a GPU with mixed_precision "bf16", else fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Section):
    section: ClassVar[str] = "student"

    kind: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA, or a full copy of the weights, which is exported as a checkpoint
    and as a LoRA extracted from it."""

    init: str | None = None
    """A few-step LoRA file to start from; "none": start from the teacher itself."""

    rank: int = _number(64, low=1, high=4096)
    """Rank of the student's LoRA: the one that is exported; of full weights, the rank of the
    LoRA that is extracted."""

    alpha: float = _number(8.0, low=0, open_low=True)
    """Scale of the student's LoRA: its output is multiplied by alpha / rank."""

    learning_rate: float = _number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the student. It must learn more slowly than the critic follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig(Section):
    section: ClassVar[str] = "critic"

    kind: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA on the shared base, or a full copy of the weights."""

    rank: int = _number(64, low=1, high=4096)
    """Rank of the critic's LoRA; better not below the student's, since it tracks the student."""

    alpha: float = _number(8.0, low=0, open_low=True)
    """Scale of the critic's LoRA: its output is multiplied by alpha / rank."""

    learning_rate: float = _number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the critic."""

    loss_space: Literal["prediction", "velocity"] = "prediction"
    """Where the critic's denoising error is counted: in what the network predicts (the paper), or
    as velocity, where the errors of an epsilon model at high noise, in layout and colours, weigh
    more. A v model predicts velocity anyway."""

    updates_per_generator: int = _number(5, low=1, high=1000)
    """Critic updates for each student update: the student is updated every so many iterations."""

    warmup_iterations: int = _number(0, low=0)
    """Iterations at the start that update the critic alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Section):
    section: ClassVar[str] = "sampling"

    steps: int = _number(4, low=1, high=100)
    """Number of evenly spaced sampling steps; 4 means timesteps 999, 749, 499, 249."""

    timesteps: tuple[int, ...] = _number((), low=1, high=NUM_TIMESTEPS - 1)
    """An explicit, descending list of timesteps in place of `steps`; empty: use `steps`. Not 0:
    there is nothing left to denoise there."""

    conditioning_timestep: int | None = _number(None, low=1, high=NUM_TIMESTEPS - 1)
    """Timestep that the network is told at the first step (399 for one-step SDXL); "none": the
    true one."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        pairs = zip(self.timesteps, self.timesteps[1:], strict=False)
        if any(later >= earlier for earlier, later in pairs):
            ordered = sorted(set(self.timesteps), reverse=True)
            raise ValueError(
                f"sampling.timesteps is {show_value(self.timesteps)}; its numbers must descend, "
                f"such as {ordered}."
            )
        steps = len(self.timesteps) or self.steps
        if self.conditioning_timestep is not None and steps > 1:
            key = "timesteps" if self.timesteps else "steps"
            raise ValueError(
                f"sampling.conditioning_timestep is {self.conditioning_timestep}, which belongs to "
                f"one-step students, but sampling.{key} is {show_value(getattr(self, key))}; set "
                'sampling.steps to 1, or sampling.conditioning_timestep to "none".'
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionMatchingConfig(Section):
    section: ClassVar[str] = "distribution_matching"

    enabled: bool = True
    """Whether the distribution matching loss trains the student."""

    guidance: float = _number(8.0, low=1, high=100)
    """Classifier-free guidance of the teacher's score, baked into the student; 1: no guidance."""

    min_timestep: int = _number(20, low=0, high=NUM_TIMESTEPS - 1)
    """Smallest timestep at which teacher and critic are compared."""

    max_timestep: int = _number(980, low=0, high=NUM_TIMESTEPS - 1)
    """Largest timestep at which teacher and critic are compared."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.min_timestep > self.max_timestep:
            raise ValueError(
                f"distribution_matching.min_timestep is {self.min_timestep}, above max_timestep "
                f"{self.max_timestep}; set it to at most {self.max_timestep}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig(Section):
    section: ClassVar[str] = "gan"

    enabled: bool = True
    """Whether a discriminator head on the critic's middle block compares with real images."""

    generator_weight: float = _number(5e-3, low=0, open_low=True)
    """Weight of the GAN loss in the student's update."""

    critic_weight: float = _number(1e-2, low=0, open_low=True)
    """Weight of the GAN loss in the critic's update, beside its denoising loss."""

    learning_rate: float = _number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the discriminator head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardSimulationConfig(Section):
    section: ClassVar[str] = "backward_simulation"

    enabled: bool = True
    """Whether the student trains on what its own earlier steps made, or on noised real images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Section):
    section: ClassVar[str] = "training"

    objective: Literal["dmd2", "dmd"] = "dmd2"
    """"dmd": that of the first paper (arXiv 2311.18828), with a regression loss on the teacher's
    pairs in every update of the student. What is not set with it becomes that paper's:
    sampling.steps 1, gan.enabled false, critic.updates_per_generator 1."""

    iterations: int = _number(16_000, low=1)
    """Number of iterations, each with one critic update but for those of the regression."""

    batch_size: int = _number(4, low=1)
    """Images in one forward pass."""

    gradient_accumulation_steps: int = _number(1, low=1)
    """Batches whose gradients are averaged for one update: the global batch is the number of
    processes x `batch_size` x this, and only its size, not its parts, decides what is learnt."""

    seed: int = _number(0, low=0, high=LARGEST_SEED)
    """Seed of everything random in training; the same seed gives the same LoRA file."""

    weight_decay: float = _number(0.01, low=0, high=1)
    """AdamW's weight decay, for student, critic and head."""

    betas: tuple[float, float] = _number((0.9, 0.999), low=0, high=1, open_high=True)
    """AdamW's two decay rates."""

    max_grad_norm: float = _number(10.0, low=0, open_low=True)
    """Gradients are scaled down to this norm, for student and critic apart."""

    ema_decay: float = _number(0.99, low=0, high=1, open_high=True)
    """Decay, for each student update, of the averaged student that is exported; 0: no averaging."""

    learning_rate_decay: float = _number(0.0, low=0, high=1)
    """Share of the iterations, the last ones, over which every learning rate falls to zero in a
    straight line; 0: they stay as they are (the paper)."""

    max_nonfinite_in_a_row: int = _number(10, low=1)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration; paths are relative to the folder where the command runs."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    student: StudentConfig = StudentConfig()
    critic: CriticConfig = CriticConfig()
    sampling: SamplingConfig = SamplingConfig()
    distribution_matching: DistributionMatchingConfig = DistributionMatchingConfig()
    gan: GanConfig = GanConfig()
    backward_simulation: BackwardSimulationConfig = BackwardSimulationConfig()
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        if not (self.distribution_matching.enabled or self.gan.enabled):
            raise ValueError(
                "distribution_matching.enabled and gan.enabled are both false, so nothing would "
                "train the student; set one of them to true."
            )
        if self.data.real_images is None and self.needs_real_images:
            users = ["gan.enabled is true"] if self.gan.enabled else []
            if not self.backward_simulation.enabled:
                users.append("backward_simulation.enabled is false")
            raise ValueError(
                f"data.real_images is not set, but {' and '.join(users)}, which takes real images; "
                'name a folder of captioned images, or "teacher", or change that.'
            )

        lowered = ("bf16", "fp16", "8bit", "4bit")
        if self.model.base_precision in lowered and self.training.mixed_precision != "bf16":
            raise ValueError(
                f'model.base_precision is "{self.model.base_precision}", which is for storage and '
                'computes in bf16; set training.mixed_precision to "bf16", or model.base_precision '
                'to "fp32".'
            )
        if self.student.kind == "full" and self.student.init is not None:
            raise ValueError(
                f'student.init is {self.student.init!r}, but student.kind is "full", and only a '
                'LoRA starts from a LoRA; set student.kind to "lora", or student.init to "none".'
            )
        regression, critic = self.regression.warmup_iterations, self.critic.warmup_iterations
        if regression + critic >= self.training.iterations:
            added = f" and regression.warmup_iterations is {regression}" if regression else ""
            raise ValueError(
                f"critic.warmup_iterations is {critic}{added}, but training.iterations is "
                f"{self.training.iterations}, so the student would never be updated with a critic; "
                "set it lower."
            )
        self._check_regression()
        if self.gan.enabled and self.data.resolution_px not in GAN_RESOLUTIONS_PX:
            raise ValueError(
                f"data.resolution_px is {self.data.resolution_px}, for which the GAN has no "
                f"discriminator; set it to one of {', '.join(map(str, GAN_RESOLUTIONS_PX))}, "
                "or gan.enabled to false."
            )

    def _check_regression(self) -> None:
        if not self.needs_pairs:
            return
        kept, warmup = self.training.objective == "dmd", self.regression.warmup_iterations
        because = (
            'training.objective is "dmd"' if kept else f"regression.warmup_iterations is {warmup}"
        )
        instead = 'training.objective to "dmd2"' if kept else "regression.warmup_iterations to 0"
        if self.regression.pairs is None:
            raise ValueError(
                f"regression.pairs is not set, but {because}, which takes the teacher's pairs; "
                f"name the folder that dmd2 pairs fills, or set {instead}."
            )
        steps = len(self.sampling.timesteps) or self.sampling.steps
        if steps > 1:
            key = "timesteps" if self.sampling.timesteps else "steps"
            raise ValueError(
                f"sampling.{key} is {show_value(getattr(self.sampling, key))}, but {because}, and "
                "the pairs lead from noise to an image in one step; set sampling.steps to 1, or "
                f"{instead}."
            )

    @property
    def needs_real_images(self) -> bool:
        return self.gan.enabled or not self.backward_simulation.enabled

    @property
    def needs_pairs(self) -> bool:
        """Whether the run takes (noise, teacher image) pairs."""
        return self.regression.warmup_iterations > 0 or self.training.objective == "dmd"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, with lists for tuples: what JSON can hold."""
        return {name: _plain_dict(getattr(self, name)) for name in SECTIONS}

    def recipe_settings(self) -> dict[str, dict[str, Any]]:
        """What a LoRA's metadata tells about its training: no folders, and nothing that leaves
        the weights as they are, so that the same training gives the same bytes anywhere."""
        settings = self.to_dict()
        for results in RESULTS:
            del settings[results.section]
        sources = (("data", key) for key in ("prompts", "real_images", "cache"))
        named = (("model", "path"), ("student", "init"), ("regression", "pairs"))
        for section, key in (*named, *sources):
            if settings[section][key] is not None:
                settings[section][key] = Path(settings[section][key]).name
        return settings


SECTIONS: dict[str, type[Section]] = {
    kind.section: kind
    for kind in (
        ModelConfig,
        DataConfig,
        OutputConfig,
        StudentConfig,
        CriticConfig,
        SamplingConfig,
        DistributionMatchingConfig,
        GanConfig,
        BackwardSimulationConfig,
        RegressionConfig,
        TrainingConfig,
        ValidationConfig,
        LoggingConfig,
        CheckpointConfig,
        ExportConfig,
    )
}


def _plain_dict(section: Section) -> dict[str, Any]:
    values = {item.name: getattr(section, item.name) for item in fields(section)}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
