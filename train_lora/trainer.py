"""The loop: order of updates, schedule, logging, saving. The algorithm itself is `distill.py`."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmd2_core import MiddleBlockHead, Recipe, StepPlan, derived_generator, derived_seed

from .average import WeightAverage
from .checkpoint import check_config, num_bytes, read_state, restore, tensors_of, write_state
from .checkpoint_store import CheckpointStore, newest_complete, write_text
from .config import Config
from .config_text import to_toml
from .data.training_data import TrainingData, load_training_data
from .distill import Batch, Distiller, Figures
from .distributed import join_processes, largest, leave_processes, wait_for_all
from .draws import Draws, sample_draws
from .models.components import Components
from .models.roles import CRITIC, STUDENT, LoraSpec, SharedUNet
from .output import CHECKPOINTS, check_output_directory
from .stop import StopRequest, TrainingStopped
from .update import Update, mean_figures
from .validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

LORA_FILE, CONFIG_FILE = "lora.safetensors", "config.toml"
MIDDLE_BLOCK_DOWNSCALE = 4  # SDXL's middle block works at a quarter of the latent's side


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run leaves."""

    lora: Path
    seconds: float
    """Time spent in iterations, without loading, validation and export."""


def train(config: Config) -> TrainResult:
    """Distil `config.model` into a LoRA, exported to `output.directory`.

    Raises ValueError for settings or data that cannot be used, before anything is written;
    FloatingPointError when too many updates in a row are not finite; ConnectionError when another
    process is lost; TrainingStopped when Ctrl-C or SIGTERM asked for it.
    """
    accelerator = join_processes(config.training.mixed_precision)
    if accelerator.is_main_process:  # the others would see what it has begun to write
        check_output_directory(config.output.directory, "output.directory")
    return _train(config, accelerator, None)


def resume(config: Config) -> TrainResult:
    """Go on from the newest complete checkpoint in `output.directory`, exactly as if never stopped.

    Raises as `train`; also ValueError if there is no such checkpoint, or if the settings, model or
    data are not those of the run.
    """
    run = Path(config.output.directory)
    accelerator = join_processes(config.training.mixed_precision)
    newest = int(newest_complete(run).name) if accelerator.is_main_process else 0
    checkpoint = run / CHECKPOINTS / f"{largest(newest, accelerator.device):06d}"
    state = read_state(checkpoint)
    check_config(state, config, run)
    if state["iteration"] == config.training.iterations and (run / LORA_FILE).exists():
        raise ValueError(
            f"The run in {run} is complete: {run / LORA_FILE} has its {state['iteration']} "
            "iterations. Set --training.iterations higher to train on."
        )
    return _train(config, accelerator, checkpoint)


def _train(config: Config, accelerator: Accelerator, checkpoint: Path | None) -> TrainResult:
    directory = Path(config.output.directory)
    log.info("loading the model %s", config.model.path)
    components = load_model(config)
    place(components, accelerator.device)
    log.info("encoding prompts and images")
    data = load_training_data(config, components, num_processes=accelerator.num_processes)
    trainer = build_trainer(config, components, data, accelerator)
    if checkpoint is not None:
        restore(trainer, checkpoint, read_state(checkpoint))
        log.info("going on from %s", checkpoint)
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / CONFIG_FILE, to_toml(config))
    log.info(
        "global batch %d = processes %d x batch_size %d x gradient_accumulation_steps %d",
        *(trainer.global_batch, accelerator.num_processes),
        *(config.training.batch_size, config.training.gradient_accumulation_steps),
    )
    trainer.run()
    if accelerator.is_main_process:
        trainer.export(directory / LORA_FILE)
    wait_for_all(accelerator.device)
    leave_processes()
    return TrainResult(lora=directory / LORA_FILE, seconds=trainer.seconds_training)


def load_model(config: Config) -> Components:
    if config.model.path == "demo":
        from .demo.teacher import load_teacher

        return load_teacher()
    from .models.loading import load_components

    return load_components(config.model.path)


def place(components: Components, device: torch.device) -> None:
    for network in (components.unet, components.vae, *components.text_encoders):
        network.to(device)


def step_plan(config: Config) -> StepPlan:
    sampling = config.sampling
    if sampling.timesteps:
        return StepPlan(
            timesteps=sampling.timesteps, conditioning_timestep=sampling.conditioning_timestep
        )
    return StepPlan.evenly(sampling.steps, conditioning_timestep=sampling.conditioning_timestep)


def build_trainer(
    config: Config, components: Components, data: TrainingData, accelerator: Accelerator
) -> Trainer:
    """The shared UNet with its two adapters, the head, and everything the loop needs."""
    settings = config.training
    adapters = {
        STUDENT: LoraSpec(rank=config.student.rank, alpha=config.student.alpha),
        CRITIC: LoraSpec(rank=config.critic.rank, alpha=config.critic.alpha),
    }
    unet = SharedUNet(components.unet, adapters, seed=settings.seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    head: nn.Module = nn.Identity()  # without a GAN nothing calls it
    if config.gan.enabled:
        head = MiddleBlockHead(
            unet.feature_channels,
            config.data.resolution_px // 8 // MIDDLE_BLOCK_DOWNSCALE,
            generator=derived_generator(settings.seed, HEAD_STREAM),
        )
    distiller = Distiller(
        unet=unet.to(accelerator.device),
        head=head.to(accelerator.device),
        components=components,
        plan=step_plan(config),
        config=config,
    )
    return Trainer(config=config, distiller=distiller, data=data, accelerator=accelerator)


# Independent streams of random numbers derived from the run's seed.
HEAD_STREAM, STEP_STREAM, NOISE_STREAM, ORDER_STREAM = range(4)


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
        self.student = self._update(
            list(distiller.unet.role_state_dict(STUDENT)), [(student, config.student.learning_rate)]
        )
        head = dict(distiller.head.named_parameters())
        self.critic = self._update(
            [*distiller.unet.role_state_dict(CRITIC), *(f"head.{name}" for name in head)],
            [
                (critic, config.critic.learning_rate),
                (list(head.values()), config.gan.learning_rate),
            ],
        )
        self.validation = Validation(
            config=config, distiller=distiller, captions=data.captions, average=self.average
        )
        self.checkpoints = CheckpointStore(
            run=Path(config.output.directory),
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
        )
        self.iteration = 0  # those done
        self.saved_iteration = 0
        self.seconds_training = 0.0

    def _update(self, names: list[str], groups: list[tuple[list[nn.Parameter], float]]) -> Update:
        settings = self.config.training
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate in groups],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        parameters = [p for group, _ in groups for p in group]
        return Update(names, parameters, optimizer, settings.max_grad_norm)

    @property
    def global_batch(self) -> int:
        """Images of one iteration, over all processes and micro-batches."""
        settings = self.config.training
        local = settings.batch_size * settings.gradient_accumulation_steps
        return local * int(self.accelerator.num_processes)

    def run(self) -> None:
        """The iterations that are left, with progress bar, records, validation, checkpoints."""
        from .monitor import Monitor

        is_main = self.accelerator.is_main_process
        with (
            StopRequest(announce=is_main) as stop,
            Monitor(self.config, self.accelerator, first_iteration=self.iteration) as monitor,
        ):
            while self.iteration < self.config.training.iterations:
                iteration, started = self.iteration, time.perf_counter()
                figures = self.iterate(iteration)
                self.iteration += 1
                self.seconds_training += time.perf_counter() - started
                monitor.record(iteration, figures)
                if self.validation.is_due(iteration) and is_main:
                    monitor.picture(iteration, self.validation.grid())
                signal_number = largest(stop.signal_number, self.accelerator.device)
                if signal_number or self._save_is_due():
                    self.save()
                if signal_number:
                    raise self._stopped(signal_number)

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every
        at_end = self.iteration == self.config.training.iterations
        return at_end or (every > 0 and self.iteration % every == 0)

    def save(self) -> None:
        """A checkpoint of the iterations done, by the main process; all wait for it."""
        if self.iteration == self.saved_iteration:
            return
        if self.accelerator.is_main_process:
            tensors = tensors_of(self)
            self.checkpoints.write(
                self.iteration,
                num_bytes(tensors),
                lambda folder: write_state(self, tensors, folder),
            )
        self.saved_iteration = self.iteration
        wait_for_all(self.accelerator.device)

    def _stopped(self, signal_number: int) -> TrainingStopped:
        directory = self.config.output.directory
        return TrainingStopped(
            f"stopped by {signal.Signals(signal_number).name} after iteration {self.iteration} "
            f"and saved; go on with: dmd2 train --resume {directory}",
            signal_number,
        )

    def iterate(self, iteration: int) -> Figures:
        """One iteration: perhaps a student update, then always a critic update, on one sample."""
        settings, critic = self.config.training, self.config.critic
        updates_student = (
            iteration >= critic.warmup_iterations
            and (iteration - critic.warmup_iterations) % critic.updates_per_generator == 0
        )
        step = self.step_index(iteration)
        figures: Figures = {}
        parts: list[Figures] = []
        consumed = []
        for micro in range(settings.gradient_accumulation_steps):
            batch, draws = self._batch_and_draws(iteration, micro)
            with self.accelerator.autocast():
                sample = self.distiller.student_sample(
                    batch, step, draws, with_graph=updates_student
                )
                if updates_student:
                    parts.append(self.distiller.generator_step(sample, draws))
            consumed.append((sample.detached(), batch, draws))
        if updates_student:
            figures |= self._apply(self.student, "student", parts, iteration)
            if not self.student.skipped_in_a_row:
                self.average.update()
        parts = []
        for sample, batch, draws in consumed:
            with self.accelerator.autocast():
                parts.append(self.distiller.critic_step(sample, batch, draws))
        return figures | self._apply(self.critic, "critic", parts, iteration)

    def step_index(self, iteration: int) -> int:
        """Where backward simulation stops: the same on every rank and in every micro-batch."""
        generator = derived_generator(self.config.training.seed, STEP_STREAM, iteration)
        return int(torch.randint(len(self.distiller.plan.timesteps), (), generator=generator))

    def _batch_and_draws(self, iteration: int, micro: int) -> tuple[Batch, Draws]:
        """This process's part of the global batch, which is one however it is split."""
        settings, ranks = self.config.training, self.accelerator.num_processes
        first = (micro * ranks + self.accelerator.process_index) * settings.batch_size
        batch = self.data.batch(
            first=iteration * self.global_batch + first,
            size=settings.batch_size,
            seed=derived_seed(settings.seed, ORDER_STREAM),
        )
        draws = sample_draws(
            settings.seed, NOISE_STREAM, iteration, first=first, count=settings.batch_size
        )
        return batch, draws

    def _apply(
        self, update: Update, name: str, parts: Sequence[Figures], iteration: int
    ) -> Figures:
        """Step, or skip what is not finite; returns the micro-batches' mean figures and its own."""
        figures = mean_figures(parts)
        broken = [n for n, v in figures.items() if n.startswith("loss/") and not v.isfinite()]
        norm = update.apply(len(parts), losses_finite=not broken)
        figures[f"gradient_norm/{name}"] = norm
        figures[f"skipped_updates/{name}"] = torch.tensor(float(update.num_skipped))
        if update.skipped_in_a_row:
            self._report_skipped(update, name, iteration, _first_broken(broken, figures, norm))
        return figures

    def _report_skipped(self, update: Update, name: str, iteration: int, reason: str) -> None:
        """Log it; stop the run with FloatingPointError when it has happened too often."""
        row, most = update.skipped_in_a_row, self.config.training.max_nonfinite_in_a_row
        if row < most:
            log.warning(
                "skipped the %s's update of iteration %d: %s (%d in a row, %d in all)",
                *(name, iteration, reason, row, update.num_skipped),
            )
            return
        raise FloatingPointError(
            f"The {name}'s update was skipped {row} times in a row, the last at iteration "
            f"{iteration}: {reason}. Lower {name}.learning_rate, or train in "
            f'mixed_precision = "no"; checkpoints are in {self.checkpoints.run / CHECKPOINTS}.'
        )

    def export(self, path: Path) -> None:
        """Write the averaged student as a LoRA file with its recipe; replaces the run's own."""
        from .export import export_lora

        recipe = recipe_of(self.config, self.distiller.components, self.iteration)
        with self.average.applied():
            export_lora(self.distiller.unet, STUDENT, path, recipe, overwrite=True)


def recipe_of(config: Config, components: Components, iterations: int) -> Recipe:
    """What a LoRA says about itself after so many iterations."""
    plan, settings = step_plan(config), config.recipe_settings()
    settings["training"]["iterations"] = iterations
    return Recipe(
        timesteps=plan.timesteps,
        conditioning_timestep=plan.conditioning_timestep,
        prediction=components.prediction,
        zero_terminal_snr=components.schedule.has_zero_terminal_snr,
        teacher_guidance=config.distribution_matching.guidance,
        lora_rank=config.student.rank,
        lora_alpha=config.student.alpha,
        base_model=components.name,
        base_model_hash=components.base_hash,
        trained_with=settings,
    )


def _first_broken(broken: Sequence[str], figures: Figures, norm: Tensor) -> str:
    if broken:
        return f"{broken[0]} is {figures[broken[0]].item()}"
    if not norm.isfinite():
        return f"its gradient is {norm.item()}"
    return "a loss is not finite in another process"
