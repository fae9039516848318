"""A new run that begins with the networks of an earlier one: stages with other settings.

From one checkpoint come the student, its average, the critic and, where both runs have the same
GAN, the discriminator's head. Iterations, optimizers and skipped updates begin at zero. From then
on the run is like any other: going on with it takes its own checkpoints alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .best import protected_checkpoints
from .checkpoint import AVERAGE, CRITIC_WEIGHTS, STUDENT_WEIGHTS, place_tensors, read_state
from .checkpoint_store import complete_at, newest_complete
from .config import Config
from .config_effects import ineffective_keys, value_of
from .config_load import from_dict
from .config_section import show_value
from .distributed import largest
from .finish import trained_with
from .model_setup import WARM_START_NOTICE
from .models.components import Components
from .models.safetensors_io import read_safetensors
from .output import CHECKPOINTS, run_and_iteration

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .loop import Trainer

log = logging.getLogger(__name__)

SAME = ("model.prediction", *(f"{r}.{k}" for r in ("student", "critic") for k in ("kind", "rank")))
SAME += ("student.alpha", "critic.alpha")
"""What the weights of a checkpoint mean nothing without; all else may be another."""
HEAD = "head."


def checkpoint_to_continue(config: Config, accelerator: Accelerator) -> Path | None:
    """The checkpoint that `training.continue_from` names, the same in every process, or None.

    Of a run the best by its validation figure, or, where it has none, the newest complete one.
    Raises ValueError if there is none, it is damaged, or its networks are not those of `config`.
    """
    source = config.training.continue_from
    if source is None:
        return None
    run, iteration = run_and_iteration(Path(source))
    chosen = 0
    if accelerator.is_main_process:
        try:
            found, why = _choice(run, iteration)
        except ValueError as error:
            raise ValueError(f"training.continue_from is {source!r}, but {error}") from error
        chosen = int(found.name)
        log.info("starting from %s, %s", found, why)
    checkpoint = run / CHECKPOINTS / f"{largest(chosen, accelerator.device):06d}"
    _check_settings(from_dict(read_state(checkpoint)["config"]), config, checkpoint)
    return checkpoint


def _choice(run: Path, iteration: int | None) -> tuple[Path, str]:
    """A complete checkpoint, and why it is this one."""
    if iteration is not None:
        return complete_at(run, iteration), "which training.continue_from names"
    for best in protected_checkpoints(run):
        return complete_at(run, best), "the best of this run by its validation figure"
    return newest_complete(run), "the newest of this run, which has no best one"


def _check_settings(before: Config, config: Config, checkpoint: Path) -> None:
    idle = set(ineffective_keys(config)) & set(ineffective_keys(before))
    if config.student.kind == "full":
        idle.add("student.rank")  # of the LoRA that is extracted
    for key in SAME:
        old, new = value_of(before, key), value_of(config, key)
        if old != new and key not in idle:
            raise ValueError(
                f"{key} is {show_value(new)}, but {checkpoint}, which training.continue_from "
                f"starts from, was trained with {show_value(old)}; set it to that, or start "
                "without training.continue_from."
            )


def check_base(checkpoint: Path, components: Components) -> None:
    """ValueError unless the checkpoint was trained on this base model."""
    expected = read_state(checkpoint)["matches"]["base model's hash"]
    if components.base_hash != expected:
        raise ValueError(
            f"model.path is not the model that {checkpoint} was trained on (its hash is "
            f"{components.base_hash[:12]}, not {expected[:12]}), and training.continue_from takes "
            "that one's weights; set model.path to that model, or training.continue_from to "
            '"none".'
        )


def continue_from(trainer: Trainer, checkpoint: Path) -> None:
    """Give a trainer that has done nothing the networks of the checkpoint.

    The average keeps the number of its updates, or its first new ones would replace it.
    """
    state = read_state(checkpoint)
    before = from_dict(state["config"])
    student = trainer.student
    for name, into in (
        (STUDENT_WEIGHTS, student.parameters),
        (AVERAGE, trainer.average.averages),
    ):
        path = checkpoint / f"{name}.safetensors"
        own = dict(zip(student.names, into, strict=True))
        place_tensors(path, read_safetensors(path)[0], own)
    trainer.average.num_updates = state["average_updates"]
    _continue_critic(trainer, checkpoint / f"{CRITIC_WEIGHTS}.safetensors", before)
    trainer.earlier = trained_with(before, state["iteration"], state.get("earlier"))
    for init in _warm_starts(trainer.earlier):
        log.info(WARM_START_NOTICE, init)


def _continue_critic(trainer: Trainer, path: Path, before: Config) -> None:
    own = dict(zip(trainer.critic.names, trainer.critic.parameters, strict=True))
    tensors = read_safetensors(path)[0]
    heads = [{n: t.shape for n, t in part.items() if n.startswith(HEAD)} for part in (own, tensors)]
    same = heads[0] == heads[1] and _seen_by_head(before) == _seen_by_head(trainer.config)
    if not same:
        own = {name: tensor for name, tensor in own.items() if name not in heads[0]}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads[1]}
    if heads[0] and not same:
        log.info("the discriminator's head starts anew: the earlier run had no such GAN")
    place_tensors(path, tensors, own)


def _seen_by_head(config: Config) -> tuple[Any, ...]:
    return config.gan.features, config.gan.layers


def _warm_starts(settings: Mapping[str, Any]) -> Iterator[str]:
    """Files that the earlier runs started from: their licences reach this one as well."""
    if settings["student"]["init"] is not None:
        yield settings["student"]["init"]
    if "earlier" in settings:
        yield from _warm_starts(settings["earlier"])
