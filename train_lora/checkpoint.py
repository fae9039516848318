"""The state of a training as files, and back: never the frozen base, never a pickle.

student, critic (with the discriminator's head), the student's average and both optimizers are
safetensors; state.json has the counters, the configuration, versions and what the run must match.
Batches, noise and the place of backward simulation are functions of the seed and the iteration
(`draws.py`, `data/order.py`), and nothing else in an iteration draws: the number of iterations is
all there is of data position, random state and the phase of the two time-scales.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint_store import write_text
from .config import SECTIONS, Config
from .config_effects import ineffective_keys, value_of
from .config_load import from_dict
from .config_section import show_value
from .models.safetensors_io import read_safetensors, write_safetensors
from .regression_losses import PerceptualLoss
from .sharding import place_whole, shards_like, to_main

if TYPE_CHECKING:
    from .loop import Trainer
    from .update import Update

log = logging.getLogger(__name__)

STATE = "state.json"
STUDENT_WEIGHTS, CRITIC_WEIGHTS, AVERAGE = "student", "critic", "student_average"
LIBRARIES = ("dmd2", "torch", "diffusers", "peft", "accelerate", "safetensors")

CHANGEABLE = (
    *("validation", "logging", "checkpoint", "export", "output.directory"),
    *("student.learning_rate", "critic.learning_rate", "gan.learning_rate"),
    "regression.learning_rate",
    *("training.iterations", "training.batch_size", "training.gradient_accumulation_steps"),
    *("training.gradient_checkpointing", "training.compile", "training.max_nonfinite_in_a_row"),
)
"""Sections and keys that a resumed run may set anew; of the batch, the total must stay."""
MOVABLE = (
    *("model.path", "data.prompts", "data.real_images", "data.cache"),
    *("regression.pairs", "regression.lpips_weights", "regression.tiny_vae"),
)
"""Paths that may be others, since the content is compared, but not appear or go."""


def tensors_of(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """File name -> tensors, sharing memory with the training; some of them may be sharded."""
    average = trainer.average.averages
    return {
        STUDENT_WEIGHTS: dict(zip(trainer.student.names, trainer.student.parameters, strict=True)),
        CRITIC_WEIGHTS: dict(zip(trainer.critic.names, trainer.critic.parameters, strict=True)),
        AVERAGE: dict(zip(trainer.student.names, average, strict=True)),
        "student_optimizer": optimizer_state(trainer.student)[0],
        "critic_optimizer": optimizer_state(trainer.critic)[0],
    }


def num_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())


def write_state(trainer: Trainer, tensors: Mapping[str, Mapping[str, Tensor]], to: Path) -> None:
    """The files of a checkpoint, in an existing folder, by the main process.

    Meanwhile the others `hand_over` the same tensors: the files are the same for any number of
    processes.
    """
    for name, part in tensors.items():
        write_safetensors(to / f"{name}.safetensors", to_main(part), {"format": "pt"})
    state = {
        "iteration": trainer.iteration,
        "seconds_training": trainer.seconds_training,
        "average_updates": trainer.average.num_updates,
        "mean_weight": trainer.distiller.adversary.mean_weight,
        "caption": trainer.caption,
        "earlier": trainer.earlier,
        "student": _counters(trainer.student),
        "critic": _counters(trainer.critic),
        "matches": _identity(trainer),
        "config": trainer.config.to_dict(),
        "versions": _versions(),
    }
    write_text(to / STATE, json.dumps(state, indent=1) + "\n")


def hand_over(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """This process's shards to the main one, part by part as that writes them."""
    for part in tensors.values():
        to_main(part)


def read_state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def check_config(state: Mapping[str, Any], config: Config, run: str | Path) -> None:
    """ValueError for a setting that cannot change in the middle of a run."""
    before = from_dict(state["config"])
    idle = set(ineffective_keys(config)) & set(ineffective_keys(before))
    for section, kind in SECTIONS.items():
        for key in (f"{section}.{item.name}" for item in fields(kind)):
            old, new = value_of(before, key), value_of(config, key)
            if old == new or key in idle or section in CHANGEABLE or key in CHANGEABLE:
                continue
            if key in MOVABLE and None not in (old, new):
                continue
            raise ValueError(
                f"{key} is {show_value(new)}, but the run in {run} has trained with "
                f"{show_value(old)}; leave it so, or start a new run in another folder."
            )
    if config.training.iterations < state["iteration"]:
        raise ValueError(
            f"training.iterations is {config.training.iterations}, but the run in {run} has done "
            f"{state['iteration']} already; set it higher, or export with dmd2 export."
        )


def restore(trainer: Trainer, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Put the trainer where the checkpoint was; ValueError for another model or other data."""
    for what, found in _identity(trainer).items():
        if found != state["matches"][what]:
            raise ValueError(
                f"{checkpoint} does not fit: its {what} is {state['matches'][what]}, now {found}; "
                f"{_REMEDIES[what]}."
            )
    for update, name in ((trainer.student, STUDENT_WEIGHTS), (trainer.critic, CRITIC_WEIGHTS)):
        _copy(checkpoint / f"{name}.safetensors", update.names, update.parameters)
        counters, optimizer_file = state[name], checkpoint / f"{name}_optimizer.safetensors"
        _restore_optimizer(update, optimizer_file, counters["optimizer_numbers"])
        update.num_skipped = counters["num_skipped"]
        update.skipped_in_a_row = counters["skipped_in_a_row"]
    average = checkpoint / f"{AVERAGE}.safetensors"
    _copy(average, trainer.student.names, trainer.average.averages)
    trainer.average.num_updates = state["average_updates"]
    if "mean_weight" in state:  # runs of before there were divergences have none
        trainer.distiller.adversary.mean_weight = state["mean_weight"]
    trainer.earlier = state.get("earlier")
    trainer.iteration = trainer.saved_iteration = state["iteration"]
    trainer.seconds_training = state["seconds_training"]
    changed = {k: v for k, v in _versions().items() if state["versions"].get(k) != v}
    if changed:
        log.warning(
            "other versions than at the checkpoint, so the last bits may differ: %s",
            ", ".join(f"{k} {state['versions'].get(k)} -> {v}" for k, v in changed.items()),
        )


_REMEDIES = {
    "base model's hash": "set --model.path to the model that the run was started with",
    "number of prompts": "put the prompts back, or start a new run",
    "number of real images": "put the images back, or start a new run",
    "number of pairs": "set --regression.pairs to those that the run was started with",
    "regression loss's networks": "set --regression.lpips_weights and --regression.tiny_vae to "
    "those that the run was started with",
    "global batch": "set training.batch_size or training.gradient_accumulation_steps so that "
    "processes x batch_size x gradient_accumulation_steps is as before",
}


def _identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for the run to be continued; the keys stand in messages."""
    data, regression = trainer.data, trainer.distiller.regression
    pairs = {} if data.pairs is None else {"number of pairs": len(data.pairs)}
    if isinstance(regression, PerceptualLoss):
        pairs["regression loss's networks"] = regression.fingerprint
    return pairs | {
        "base model's hash": trainer.distiller.components.base_hash,
        "number of prompts": len(data.prompts),
        "number of real images": data.num_real_images,
        "global batch": trainer.global_batch,
    }


def _counters(update: Update) -> dict[str, Any]:
    return {
        "num_skipped": update.num_skipped,
        "skipped_in_a_row": update.skipped_in_a_row,
        "optimizer_numbers": optimizer_state(update)[1],
    }


def optimizer_state(update: Update) -> tuple[dict[str, Tensor], dict[str, float]]:
    """ "PARAMETER.exp_avg" and so on -> tensor, and -> plain number for what is none.

    Learning rates and the like are no state: they come from the configuration.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in zip(update.names, update.parameters, strict=True):
        for key, value in update.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                assert isinstance(value, int | float), f"{key} is {type(value)}"
                numbers[f"{name}.{key}"] = value
    return tensors, numbers


def _restore_optimizer(update: Update, path: Path, numbers: Mapping[str, float]) -> None:
    """Through the optimizer's own `load_state_dict`, which knows each value's device and type."""
    index = {name: position for position, name in enumerate(update.names)}
    parameters = dict(zip(update.names, update.parameters, strict=True))
    state: dict[int, dict[str, Any]] = {}
    for full, value in (*read_safetensors(path)[0].items(), *numbers.items()):
        name, _, key = full.rpartition(".")
        if name not in index:
            raise ValueError(f"{path} has a state for {name}, which this run does not train.")
        if isinstance(value, Tensor):
            value = shards_like(parameters[name], value)
        state.setdefault(index[name], {})[key] = value
    groups = update.optimizer.state_dict()["param_groups"]
    update.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _copy(path: Path, names: Sequence[str], into: Sequence[Tensor]) -> None:
    place_tensors(path, read_safetensors(path)[0], dict(zip(names, into, strict=True)))


@torch.no_grad()
def place_tensors(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, of the file `path`, into `own`, some of which may be sharded.

    ValueError where names or shapes are not the same.
    """
    wrong = sorted(set(own) ^ set(tensors))
    wrong += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(
            f"{path} does not fit: {len(wrong)} tensors differ, first {wrong[0]}; "
            "continue with the program version and settings that wrote it."
        )
    for name, tensor in own.items():
        place_whole(tensors[name], tensor)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # running from its folder
            found[name] = "not installed"
    return found
