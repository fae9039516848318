"""Every option of the trainer: its meaning, its default, its range.

A `Config` is frozen: config_load.py builds it once from a preset, a TOML file and the command line,
config_text.py writes it. The string under each field is its documentation (`dmd2 config --keys`).
Defaults are the paper's for an SDXL LoRA in 4 steps; the demo's own are in presets/demo.toml.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from .config_anchor import DiversityAnchorConfig
from .config_classes import check_classes, has_classes
from .config_losses import DistributionMatchingConfig, GanConfig
from .config_networks import CriticConfig, StudentConfig
from .config_regression import WEIGHT_SOURCES, RegressionConfig
from .config_results import (
    RESULTS,
    CheckpointConfig,
    ExportConfig,
    LoggingConfig,
    OutputConfig,
    ValidationConfig,
)
from .config_sampling import BackwardSimulationConfig, SamplingConfig
from .config_section import NUM_TIMESTEPS, Section, show_value
from .config_training import TrainingConfig
from .data.settings import DataConfig

GAN_RESOLUTIONS_PX = (128, 256, 512, 1024, 2048, 4096)  # 4, 8, ... cells in the middle block


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"

    path: str
    """The teacher: one SDXL or SD1.5 .safetensors file, a diffusers folder, a hub id "org/name"
    (downloaded once), "demo" (the embedded one), or an EDM network of `dmd2 convert-edm`."""

    prediction: Literal["auto", "epsilon", "v", "v-zero-snr", "flow"] = "auto"
    """What the teacher predicts, v with or without zero terminal SNR; "auto": what its file says.
    Needed for a file that does not say it, as those of flow models; against what the file says it
    is refused."""

    base_precision: Literal["auto", "bf16", "fp16", "fp32", "8bit", "4bit"] = "auto"
    """Precision in which the frozen base is stored; 8bit and 4bit need bitsandbytes. "auto": bf16
    on a GPU with mixed_precision "bf16", else fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration; paths are relative to the folder where the command runs."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    student: StudentConfig = field(default_factory=StudentConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    distribution_matching: DistributionMatchingConfig = field(
        default_factory=DistributionMatchingConfig
    )
    gan: GanConfig = field(default_factory=GanConfig)
    diversity_anchor: DiversityAnchorConfig = field(default_factory=DiversityAnchorConfig)
    backward_simulation: BackwardSimulationConfig = field(default_factory=BackwardSimulationConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
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

        divergence = self.distribution_matching.divergence
        if divergence != "reverse-kl" and not self.gan.enabled:
            raise ValueError(
                f'distribution_matching.divergence is "{divergence}", which weights samples by '
                "what the discriminator makes of them, but gan.enabled is false; set gan.enabled "
                'to true, or distribution_matching.divergence to "reverse-kl".'
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
        if self.student.init is not None and self.training.continue_from is not None:
            raise ValueError(
                f"student.init is {self.student.init!r}, but training.continue_from is "
                f"{self.training.continue_from!r}, whose student this run starts from; set one of "
                'them to "none".'
            )
        regression, critic = self.regression.warmup_iterations, self.critic.warmup_iterations
        if regression + critic >= self.training.iterations:
            added = f" and regression.warmup_iterations is {regression}" if regression else ""
            raise ValueError(
                f"critic.warmup_iterations is {critic}{added}, but training.iterations is "
                f"{self.training.iterations}, so the student would never be updated with a critic; "
                "set training.iterations higher, or a warm-up lower."
            )
        self._check_regression()
        self._check_anchor()
        check_classes(self)
        sides = None if has_classes(self) else GAN_RESOLUTIONS_PX
        if self.gan.enabled and sides and self.data.resolution_px not in sides:
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
        if steps > 1 or self.sampling.random_steps is not None:
            key = "timesteps" if self.sampling.timesteps else "steps"
            remedy = "sampling.steps to 1"
            if self.sampling.random_steps is not None:
                key, remedy = (
                    "random_steps",
                    'sampling.random_steps to "none" and sampling.steps to 1',
                )
            raise ValueError(
                f"sampling.{key} is {show_value(getattr(self.sampling, key))}, but {because}, and "
                f"the pairs lead from noise to an image in one step; set {remedy}, or {instead}."
            )
        loss = self.regression.loss
        if loss != "mse" and self.regression.lpips_weights is None:
            raise ValueError(
                f'regression.lpips_weights is not set, but regression.loss is "{loss}", and '
                f"nothing downloads its network; get {WEIGHT_SOURCES[loss]} and name the file, or "
                'set regression.loss to "mse".'
            )

    def _check_anchor(self) -> None:
        steps = len(self.sampling.timesteps) or self.sampling.steps
        if self.diversity_anchor.weight > 0 and steps == 1:
            raise ValueError(
                f"diversity_anchor.weight is {self.diversity_anchor.weight}, which leaves the "
                "first step to the anchor alone, but the student has no other; set "
                "sampling.steps to 2 or more, or diversity_anchor.weight to 0."
            )
        if self.diversity_anchor.weight > 0 and self.sampling.random_steps is not None:
            self._check_anchor_of_random_steps(*self.sampling.random_steps)

    def _check_anchor_of_random_steps(self, fewest: int, most: int) -> None:
        """Every plan that may be drawn needs a later step, and the teacher a way down to it."""
        told = f"sampling.random_steps is {show_value(self.sampling.random_steps)}"
        if fewest == 1:
            raise ValueError(
                f"{told}, but diversity_anchor.weight is {self.diversity_anchor.weight}, which "
                "leaves the first step to the anchor alone; begin at 2, or set "
                "diversity_anchor.weight to 0."
            )
        shortest = NUM_TIMESTEPS // (2 * most)  # from 999 to the highest second timestep
        steps = self.diversity_anchor.teacher_steps
        if self.diversity_anchor.timestep is None and shortest < steps:
            raise ValueError(
                f"diversity_anchor.teacher_steps is {steps}, but {told}, and its second timestep "
                f"may be {shortest} below the first; set diversity_anchor.teacher_steps to at most "
                f"{shortest}, or diversity_anchor.timestep."
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
        named = (("model", "path"), ("student", "init"), ("training", "continue_from"))
        regressions = (("regression", key) for key in ("pairs", "lpips_weights", "tiny_vae"))
        for section, key in (*named, *regressions, *sources):
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
        DiversityAnchorConfig,
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
