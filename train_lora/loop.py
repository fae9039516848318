"""The loop: order of updates, schedule, logging, saving. The algorithm itself is `distill.py`."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmd2_core import StepPlan, derived_generator, derived_seed

from .average import WeightAverage
from .best import Best, protected_checkpoints
from .checkpoint import hand_over, num_bytes, tensors_of, write_state
from .checkpoint_store import CheckpointStore
from .config import Config
from .data.class_folders import ClassData
from .data.training_data import TrainingData
from .distill import Batch, Distiller, Figures, Pairs
from .distributed import largest, wait_for_all
from .draws import Draws, sample_draws
from .finish import CHECKPOINT_FILE, export_student, thumbnail_condition
from .models.roles import CRITIC, STUDENT
from .optimizer import build_optimizer
from .output import CHECKPOINTS
from .step_grids import drawn_plan
from .stop import StopRequest, TrainingStopped
from .update import Update, mean_figures, rate_factor
from .validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .monitor import Monitor

log = logging.getLogger(__name__)

# Independent streams of random numbers derived from the run's seed.
HEAD_STREAM, STEP_STREAM, NOISE_STREAM, ORDER_STREAM, PLAN_STREAM = range(5)


class Trainer:
    """State of one run. The step counter is its only position: batch and noise derive from it."""

    def __init__(
        self, *, config: Config, distiller: Distiller, data: TrainingData | ClassData,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.config, self.distiller, self.data = config, distiller, data
        self.accelerator = accelerator
        student = distiller.unet.parameters_of(STUDENT)
        critic = distiller.unet.parameters_of(CRITIC)
        self.average = WeightAverage(student, config.training.ema_decay)
        self.student = self._update(
            list(distiller.unet.role_state_dict(STUDENT)),
            [(student, config.student.learning_rate)],
            config.training.betas,
        )
        head = dict(distiller.head.named_parameters())
        self.critic = self._update(
            [*distiller.unet.role_state_dict(CRITIC), *(f"head.{name}" for name in head)],
            [
                (critic, config.critic.learning_rate),
                (list(head.values()), config.gan.learning_rate),
            ],
            config.critic.betas or config.training.betas,
        )
        self.validation = Validation(
            config=config,
            distiller=distiller,
            captions=data.captions,
            average=self.average,
            is_main_process=accelerator.is_main_process,
        )
        directory = Path(config.output.directory)
        self.best = Best(run=directory, figure=config.validation.best, stamp=self.validation.stamp)
        self.checkpoints = CheckpointStore(
            run=directory,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            protected=lambda: protected_checkpoints(directory),
        )
        self.caption = data.prompts.captions(range(1))[0]
        self.pictured = None
        if config.export.thumbnail:  # encoded now: later the text encoders may be off the GPU
            self.pictured = thumbnail_condition(config, distiller.components, self.caption)
        self.earlier: dict[str, Any] | None = None  # settings of the run that this one continues
        self.iteration = 0  # those done
        self.saved_iteration = 0
        self.seconds_training = 0.0

    def _update(
        self,
        names: list[str],
        groups: list[tuple[list[nn.Parameter], float]],
        betas: tuple[float, float],
    ) -> Update:
        settings = self.config.training
        optimizer = build_optimizer(
            settings.optimizer,
            groups,
            betas=betas,
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
        if is_main:
            self.best.recall()
        with (
            StopRequest(announce=is_main) as stop,
            Monitor(
                self.config,
                self.accelerator,
                first_iteration=self.iteration,
                images_per_iteration=self.global_batch,
                standing=self.standing_figures,
            ) as monitor,
        ):
            while self.iteration < self.config.training.iterations:
                started = time.perf_counter()
                figures = self.iterate(self.iteration)
                self.iteration += 1
                seconds = time.perf_counter() - started
                self.seconds_training += seconds
                monitor.note(self.iteration, figures, seconds)
                is_best = self.validation.is_due(self.iteration) and self._validate(monitor)
                signal_number = largest(stop.signal_number, self.accelerator.device)
                if signal_number or is_best or self._save_is_due():
                    self.save()
                if is_best and is_main:
                    self.best.write()
                    self.checkpoints.purge()  # the one that was the best before
                if signal_number:
                    raise self._stopped(signal_number)
        if is_main:
            self.best.say()

    def _validate(self, monitor: Monitor) -> bool:
        """By all processes together; whether it is the best so far, on which they agree."""
        is_best, result = False, self.validation.run()
        if result is not None:
            monitor.validated(self.iteration, result)
            is_best = self.best.note(self.iteration, result.figures)
        return largest(int(is_best), self.accelerator.device) > 0

    def standing_figures(self) -> dict[str, float]:
        """What a record tells beside the means: learning rates, and updates skipped so far."""
        rates = [group["lr"] for group in self.critic.optimizer.param_groups]
        figures = {
            "learning_rate/student": self.student.optimizer.param_groups[0]["lr"],
            "learning_rate/critic": rates[0],
            "skipped_updates/student": float(self.student.num_skipped),
            "skipped_updates/critic": float(self.critic.num_skipped),
        }
        if self.config.gan.enabled:
            figures["learning_rate/discriminator"] = rates[1]
        return figures

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every
        at_end = self.iteration == self.config.training.iterations
        return at_end or (every > 0 and self.iteration % every == 0)

    @property
    def _draws(self) -> bool:
        """Whether this process has a part in making pictures: all have where weights are sharded,
        else the main one alone."""
        return self.accelerator.is_main_process or self.distiller.unet.needs_all_processes

    def save(self) -> None:
        """A checkpoint of the iterations done, by the main process; all call it and wait."""
        if self.iteration == self.saved_iteration:
            return
        tensors = tensors_of(self)
        if self.accelerator.is_main_process:
            self.checkpoints.write(
                self.iteration,
                num_bytes(tensors),
                lambda folder: write_state(self, tensors, folder),
            )
        else:
            hand_over(tensors)
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
        """One iteration: perhaps a student update, then always a critic update, on one sample.

        Before these, where `regression` asks for it, updates of the student on the pairs alone.
        """
        settings, critic = self.config.training, self.config.critic
        first_of_critic = self.config.regression.warmup_iterations
        if iteration < first_of_critic:
            return self._regress(iteration)
        if 0 < iteration == first_of_critic:  # another loss, so other moments
            self.student.optimizer.state.clear()
        since = iteration - first_of_critic - critic.warmup_iterations
        updates_student = since >= 0 and since % critic.updates_per_generator == 0
        distiller = self.distiller.at(self.plan_of(iteration))
        step = self.step_index(iteration)
        figures: Figures = {}
        parts: list[Figures] = []
        consumed = []
        for micro in range(settings.gradient_accumulation_steps):
            batch, draws = self._batch_and_draws(iteration, micro)
            with self.accelerator.autocast():
                sample = distiller.student_sample(batch, step, draws, with_graph=updates_student)
                if updates_student:
                    pairs = self._pairs(iteration, micro) if settings.objective == "dmd" else None
                    parts.append(distiller.generator_step(sample, draws, pairs))
            consumed.append((sample.detached(), batch, draws))
        if updates_student:
            figures |= self._apply(self.student, "student", parts, iteration)
            figures |= self.distiller.adversary.settle()
            if not self.student.skipped_in_a_row:
                self.average.update()
        parts = []
        for sample, batch, draws in consumed:
            with self.accelerator.autocast():
                parts.append(distiller.critic_step(sample, batch, draws))
        return figures | self._apply(self.critic, "critic", parts, iteration)

    def _regress(self, iteration: int) -> Figures:
        """One update of the student on the teacher's pairs."""
        settings, parts = self.config.training, []
        for micro in range(settings.gradient_accumulation_steps):
            with self.accelerator.autocast():
                parts.append(self.distiller.regression_step(self._pairs(iteration, micro)))
        faster = self.config.regression.learning_rate / self.config.student.learning_rate
        figures = self._apply(self.student, "student", parts, iteration, faster=faster)
        if not self.student.skipped_in_a_row:
            self.average.update()
        return figures

    def step_index(self, iteration: int) -> int:
        """Where backward simulation stops: the same on every rank and in every micro-batch."""
        generator = derived_generator(self.config.training.seed, STEP_STREAM, iteration)
        low = 0 if self.distiller.anchor is None else 1  # the first step learns from it alone
        high = len(self.plan_of(iteration).timesteps)
        return int(torch.randint(low, high, (), generator=generator))

    def plan_of(self, iteration: int) -> StepPlan:
        """The steps that an iteration trains: the same on every rank and in every micro-batch."""
        counts = self.config.sampling.random_steps
        if counts is None:
            return self.distiller.plan
        seed = self.config.training.seed
        return drawn_plan(counts, derived_generator(seed, PLAN_STREAM, iteration))

    def _batch_and_draws(self, iteration: int, micro: int) -> tuple[Batch, Draws]:
        """This process's part of the global batch, which is one however it is split."""
        settings, first = self.config.training, self._first_of(micro)
        batch = self.data.batch(
            first=iteration * self.global_batch + first,
            size=settings.batch_size,
            seed=derived_seed(settings.seed, ORDER_STREAM),
        )
        draws = sample_draws(
            settings.seed, NOISE_STREAM, iteration, first=first, count=settings.batch_size
        )
        return batch, draws

    def _pairs(self, iteration: int, micro: int) -> Pairs:
        """This process's part of the iteration's pairs."""
        settings = self.config.training
        return self.data.pair_batch(
            first=iteration * self.global_batch + self._first_of(micro),
            size=settings.batch_size,
            seed=derived_seed(settings.seed, ORDER_STREAM),
        )

    def _first_of(self, micro: int) -> int:
        """Place in the global batch of this process's part."""
        part = micro * int(self.accelerator.num_processes) + self.accelerator.process_index
        return part * self.config.training.batch_size

    def _apply(
        self,
        update: Update,
        name: str,
        parts: Sequence[Figures],
        iteration: int,
        *,
        faster: float = 1.0,
    ) -> Figures:
        """Step, or skip what is not finite; returns the micro-batches' mean figures and its own.

        `faster`: factor of the learning rates.
        """
        figures = mean_figures(parts)
        broken = [n for n, v in figures.items() if n.startswith("loss/") and not v.isfinite()]
        factor = faster * rate_factor(self.config.training, iteration)
        norm = update.apply(len(parts), losses_finite=not broken, rate_factor=factor)
        figures[f"gradient_norm/{name}"] = norm
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
        """Write the averaged student with its recipe; replaces the run's own files. All call it."""
        if not self._draws:
            return
        with self.average.applied():
            export_student(
                self.config,
                self.distiller.components,
                self.distiller.unet,
                path,
                whole=path.with_name(CHECKPOINT_FILE),
                iterations=self.iteration,
                earlier=self.earlier,
                pictured=self.pictured,
                overwrite=True,
                writes=self.accelerator.is_main_process,
            )


def _first_broken(broken: Sequence[str], figures: Figures, norm: Tensor) -> str:
    if broken:
        return f"{broken[0]} is {figures[broken[0]].item()}"
    if not norm.isfinite():
        return f"its gradient is {norm.item()}"
    return "a loss is not finite in another process"
