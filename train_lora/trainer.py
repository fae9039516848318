"""The loop: order of updates, schedule, logging, saving. The algorithm itself is `distill.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmd2_core import MiddleBlockHead, StepPlan, derived_generator, derived_seed

from .average import WeightAverage
from .config import Config
from .config_text import to_toml
from .data.training_data import TrainingData, load_training_data
from .distill import Distiller, Figures
from .distributed import average_gradients
from .finish import export_student, thumbnail, thumbnail_condition
from .model_setup import build_unet, load_model
from .models.components import Components
from .models.placement import place, place_encoders
from .models.roles import CRITIC, STUDENT, SharedUNet
from .models.text import LATENT_PX, Condition
from .optimizer import build_optimizer
from .output import check_output_directory
from .validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainResult", "Trainer", "build_trainer", "load_model", "place", "step_plan", "train"]

LORA_FILE = "lora.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run leaves."""

    lora: Path
    seconds: float
    """Time spent in iterations, without loading, validation and export."""


def train(config: Config) -> TrainResult:
    """Distil `config.model` into a LoRA, exported to `output.directory`.

    Raises ValueError for settings or data that cannot be used, before anything is written, and
    FloatingPointError, naming the iteration, when a loss is no longer finite.
    """
    from accelerate import Accelerator

    directory = Path(config.output.directory)
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    if accelerator.is_main_process:  # the others would see what it has begun to write
        check_output_directory(directory, "output.directory")
    components = load_model(config, accelerator.device)
    unet = build_unet(config, components, accelerator.device)  # before data is read for nothing
    place_encoders(components, accelerator.device)
    data = load_training_data(config, components)
    trainer = build_trainer(config, components, data, accelerator, unet)
    place_encoders(components, torch.device("cpu"))  # all is encoded
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    trainer.run()
    if accelerator.is_main_process:
        trainer.export(directory / LORA_FILE)
    accelerator.wait_for_everyone()
    return TrainResult(lora=directory / LORA_FILE, seconds=trainer.seconds_training)


def step_plan(config: Config) -> StepPlan:
    sampling = config.sampling
    if sampling.timesteps:
        return StepPlan(
            timesteps=sampling.timesteps, conditioning_timestep=sampling.conditioning_timestep
        )
    return StepPlan.evenly(sampling.steps, conditioning_timestep=sampling.conditioning_timestep)


def build_trainer(
    config: Config,
    components: Components,
    data: TrainingData,
    accelerator: Accelerator,
    unet: SharedUNet | None = None,
) -> Trainer:
    """The UNet in its roles (built here unless given), the head, and all the loop needs."""
    unet = (unet or build_unet(config, components, accelerator.device)).to(accelerator.device)
    head: nn.Module = nn.Identity()  # without a GAN nothing calls it
    if config.gan.enabled:
        head = MiddleBlockHead(
            unet.feature_channels,
            config.data.resolution_px // LATENT_PX // unet.feature_downscale,
            generator=derived_generator(config.training.seed, HEAD_STREAM),
        )
    distiller = Distiller(
        unet=unet,
        head=head.to(accelerator.device),
        components=components,
        plan=step_plan(config),
        config=config,
    )
    return Trainer(config=config, distiller=distiller, data=data, accelerator=accelerator)


# Independent streams of random numbers derived from the run's seed.
HEAD_STREAM, STEP_STREAM, NOISE_STREAM, ORDER_STREAM = range(4)


@dataclass(slots=True)
class Update:
    """One side of the game: its parameters, its optimizer, and how its gradients are treated."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    def apply(self, num_accumulated: int) -> torch.Tensor:
        """Average over micro-batches and processes, clip, step, clear; returns the norm."""
        if num_accumulated > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad /= num_accumulated
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(
            self.parameters, self.max_grad_norm, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


class Trainer:
    """State of one run. The step counter is its only position: batch and noise derive from it."""

    def __init__(
        self, *, config: Config, distiller: Distiller, data: TrainingData, accelerator: Accelerator
    ) -> None:
        self.config, self.distiller, self.data = config, distiller, data
        self.accelerator = accelerator
        student = distiller.unet.parameters_of(STUDENT)
        critic = distiller.unet.parameters_of(CRITIC)
        self.average = WeightAverage(student, config.training.ema_decay)
        self.student = self._update([(student, config.student.learning_rate)])
        self.critic = self._update(
            [
                (critic, config.critic.learning_rate),
                (list(distiller.head.parameters()), config.gan.learning_rate),
            ]
        )
        self.validation = Validation(
            config=config, distiller=distiller, captions=data.captions, average=self.average
        )
        self.pictured: Condition | None = None
        if config.export.thumbnail:
            self.pictured = thumbnail_condition(config, distiller, list(data.captions[:1]))
        self.seconds_training = 0.0

    def _update(self, groups: list[tuple[list[nn.Parameter], float]]) -> Update:
        settings = self.config.training
        optimizer = build_optimizer(
            settings.optimizer,
            groups,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        parameters = [p for group, _ in groups for p in group]
        return Update(parameters, optimizer, settings.max_grad_norm)

    def run(self) -> None:
        """All iterations, with progress bar, records and validation grids."""
        from .monitor import Monitor

        settings = self.config.training
        with Monitor(self.config, self.accelerator) as monitor:
            for iteration in range(settings.iterations):
                started = time.perf_counter()
                figures = self.iterate(iteration)
                self.seconds_training += time.perf_counter() - started
                monitor.record(iteration, figures)
                if self.validation.is_due(iteration) and self.accelerator.is_main_process:
                    monitor.picture(iteration, self.validation.grid())

    def iterate(self, iteration: int) -> Figures:
        """One iteration: perhaps a student update, then always a critic update, on one sample."""
        settings, critic = self.config.training, self.config.critic
        updates_student = (
            iteration >= critic.warmup_iterations
            and (iteration - critic.warmup_iterations) % critic.updates_per_generator == 0
        )
        step = self.step_index(iteration)
        figures: Figures = {}
        consumed = []
        for micro in range(settings.gradient_accumulation_steps):
            batch, noise = self._batch_and_noise(iteration, micro)
            with self.accelerator.autocast():
                sample = self.distiller.student_sample(
                    batch, step, noise, with_graph=updates_student
                )
                if updates_student:
                    figures |= self.distiller.generator_step(sample, noise)
            consumed.append((sample.detached(), batch, noise))
        if updates_student:
            self._apply(self.student, "student", figures, iteration)
            self.average.update()
        for sample, batch, noise in consumed:
            with self.accelerator.autocast():
                figures |= self.distiller.critic_step(sample, batch, noise)
        self._apply(self.critic, "critic", figures, iteration)
        return figures

    def step_index(self, iteration: int) -> int:
        """Where backward simulation stops: the same on every rank and in every micro-batch."""
        generator = derived_generator(self.config.training.seed, STEP_STREAM, iteration)
        return int(torch.randint(len(self.distiller.plan.timesteps), (), generator=generator))

    def _batch_and_noise(self, iteration: int, micro: int) -> tuple[Any, torch.Generator]:
        settings, ranks = self.config.training, self.accelerator.num_processes
        rank = self.accelerator.process_index
        place = (iteration * settings.gradient_accumulation_steps + micro) * ranks + rank
        batch = self.data.batch(
            first=place * settings.batch_size,
            size=settings.batch_size,
            seed=derived_seed(settings.seed, ORDER_STREAM),
        )
        return batch, derived_generator(settings.seed, NOISE_STREAM, iteration, micro, rank)

    def _apply(self, update: Update, name: str, figures: Figures, iteration: int) -> None:
        norm = update.apply(self.config.training.gradient_accumulation_steps)
        figures[f"gradient_norm/{name}"] = norm
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The {name}'s gradient is {norm.item()} at iteration {iteration}: lower "
                f'{name}.learning_rate, or train in mixed_precision = "no".'
            )

    def export(self, path: Path) -> None:
        """Write the averaged student as a LoRA file with its recipe."""
        with self.average.applied():
            picture = None
            if self.pictured is not None:
                picture = thumbnail(self.config, self.distiller, self.pictured)
            export_student(self.config, self.distiller, path, picture=picture)
