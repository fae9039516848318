"""A whole run: load, encode, train, export; from the start or from a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dmd2_core import derived_generator

from .adversary import build_head
from .checkpoint import check_config, read_state, restore
from .checkpoint_store import complete_at, newest_complete, write_text
from .config import Config
from .config_classes import has_classes
from .config_text import to_toml
from .data.cache import CACHE, PAIRS
from .data.class_folders import ClassData
from .data.freshness import changed_sources
from .data.training_data import TrainingData, load_training_data
from .distill import Distiller
from .distributed import (
    join_processes,
    largest,
    leave_processes,
    telling_of_lost_processes,
    wait_for_all,
)
from .finish import CHECKPOINT_FILE
from .inputs import check_inputs
from .loop import HEAD_STREAM, Trainer
from .model_setup import build_trainable_unet, load_model
from .models.components import Components
from .models.placement import place, place_encoders, release_encoders
from .models.roles import SharedUNet
from .output import CHECKPOINTS, check_output_directory
from .regression_losses import regression_loss_of
from .rewind import set_aside
from .sampling import step_plan
from .sharding import check_sharding
from .stages import check_base, checkpoint_to_continue, continue_from
from .trackers import check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainResult", "Trainer", "build_trainer", "place", "resume", "train"]

log = logging.getLogger(__name__)

LORA_FILE, CONFIG_FILE = "lora.safetensors", "config.toml"


def result_file(config: Config) -> Path:
    """What a finished run has exported: the LoRA, or, beside a teacher of classes, the student."""
    name = CHECKPOINT_FILE if has_classes(config) else LORA_FILE
    return Path(config.output.directory) / name


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run leaves."""

    lora: Path
    """Or, beside a teacher of classes, the whole student."""
    seconds: float
    """Time spent in iterations, without loading, validation and export."""


def train(config: Config) -> TrainResult:
    """Distil `config.model` into a LoRA, exported to `output.directory`.

    Raises ValueError for settings or data that cannot be used, before anything is written;
    FloatingPointError when too many updates in a row are not finite; ConnectionError when another
    process is lost; TrainingStopped when Ctrl-C or SIGTERM asked for it.
    """
    check_trackers(config)
    accelerator = join_processes(config.training.mixed_precision)
    if accelerator.is_main_process:  # the others would see what it has begun to write
        check_output_directory(config.output.directory, "output.directory")
    return _train(config, accelerator, None)


def resume(config: Config, *, iteration: int | None = None) -> TrainResult:
    """Go on from the newest complete checkpoint in `output.directory`, exactly as if never stopped.

    `iteration`: go back to that checkpoint instead; what came after it is set aside.

    Raises as `train`; also ValueError if there is no such checkpoint, or if the settings, model or
    data are not those of the run.
    """
    check_trackers(config)
    run = Path(config.output.directory)
    accelerator = join_processes(config.training.mixed_precision)
    chosen = 0
    if accelerator.is_main_process:
        found = newest_complete(run) if iteration is None else complete_at(run, iteration)
        chosen = int(found.name)
    checkpoint = run / CHECKPOINTS / f"{largest(chosen, accelerator.device):06d}"
    state = read_state(checkpoint)
    check_config(state, config, run)
    if state["iteration"] == config.training.iterations and result_file(config).exists():
        raise ValueError(
            f"The run in {run} is complete: {result_file(config)} has its {state['iteration']} "
            "iterations. Set --training.iterations higher to train on."
        )
    return _train(config, accelerator, checkpoint, goes_back=iteration is not None)


@telling_of_lost_processes()
def _train(
    config: Config, accelerator: Accelerator, checkpoint: Path | None, *, goes_back: bool = False
) -> TrainResult:
    check_sharding(config)
    processes, parts = int(accelerator.num_processes), config.training
    log.info(  # at the start: a launcher may have started fewer than was meant
        "%d process%s on %s: global batch %d = %d x batch_size %d x gradient_accumulation_steps %d",
        *(processes, "es" if processes > 1 else "", accelerator.device.type),
        processes * parts.batch_size * parts.gradient_accumulation_steps,
        *(processes, parts.batch_size, parts.gradient_accumulation_steps),
    )
    directory = Path(config.output.directory)
    check_inputs(config, warm=checkpoint is None)
    if accelerator.is_main_process:
        _check_freshness(config, resumed=checkpoint is not None)
    start = None if checkpoint is not None else checkpoint_to_continue(config, accelerator)
    log.info("loading the model %s", config.model.path)
    components = load_model(config, accelerator.device)
    if start is not None:
        check_base(start, components)
    unet = build_trainable_unet(  # before data is read for nothing
        config, components, accelerator.device, warm=checkpoint is None
    )
    place_encoders(components, accelerator.device)
    log.info("%s", f"reading {config.data.cache}" if config.data.cache else "encoding the data")
    data = load_training_data(
        config, components, num_processes=accelerator.num_processes, teacher=unet
    )
    trainer = build_trainer(config, components, data, accelerator, unet)
    release_encoders(components, text=not data.needs_text_encoders)
    if start is not None:
        continue_from(trainer, start)
    if checkpoint is not None:
        restore(trainer, checkpoint, read_state(checkpoint))
        log.info("going on from %s", checkpoint)
    if accelerator.is_main_process:
        if goes_back and (later := set_aside(directory, trainer.iteration)) is not None:
            log.info("what the run made after iteration %d is now in %s", trainer.iteration, later)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / CONFIG_FILE, to_toml(config))
    trainer.run()
    trainer.export(directory / LORA_FILE)
    wait_for_all(accelerator.device)
    leave_processes()
    return TrainResult(lora=result_file(config), seconds=trainer.seconds_training)


def _check_freshness(config: Config, *, resumed: bool) -> None:
    """ValueError for a cache older than its sources: days of training on old captions are lost.

    A run that goes on has trained on what was prepared, and stays what it is.
    """
    used = {CACHE: config.data.cache is not None, PAIRS: config.needs_pairs}
    for kind in (kind for kind, is_used in used.items() if is_used):
        changes = changed_sources(config, kind)
        if changes is None:
            continue
        if not resumed:
            raise ValueError(f"{changes}; {kind.again}, which encodes only what changed.")
        log.warning("%s: the run goes on with what was prepared then", changes)


def build_trainer(
    config: Config,
    components: Components,
    data: TrainingData | ClassData,
    accelerator: Accelerator,
    unet: SharedUNet | None = None,
) -> Trainer:
    """The UNet in its roles (built here unless given), the head, and all the loop needs."""
    unet = unet or build_trainable_unet(config, components, accelerator.device, warm=True)
    unet.to(accelerator.device)
    head: nn.Module = nn.Identity()  # without a GAN nothing calls it
    if config.gan.enabled:
        generator = derived_generator(config.training.seed, HEAD_STREAM)
        side = config.data.resolution_px // components.latent_px
        head = build_head(config.gan, unet, side, generator)
    distiller = Distiller(
        unet=unet,
        head=head.to(accelerator.device),
        components=components,
        plan=step_plan(config),
        config=config,
        regression=regression_loss_of(config, components, accelerator.device),
    )
    return Trainer(config=config, distiller=distiller, data=data, accelerator=accelerator)
