"""Where figures and pictures are recorded: accelerate's trackers, TensorBoard and W&B."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_store import write_text
from .config import Config

if TYPE_CHECKING:
    from PIL.Image import Image

LOGS, WANDB_ID = "logs", "wandb_id.txt"
PICTURE_PX = 2048
"""Pictures in a log are at most so wide and high; the PNG beside it has all pixels."""


def check_trackers(config: Config) -> None:
    """ValueError if a chosen tracker's library is missing: better now than after an hour."""
    if "wandb" in config.logging.trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            'logging.trackers has "wandb", but the library wandb is not installed; '
            "install it: pip install '.[wandb]' -c constraints.txt, or remove it from the list."
        )


class Trackers:
    """The trackers of one run; for its main process alone."""

    def __init__(self, config: Config, *, first_iteration: int) -> None:
        """`first_iteration`: where a resumed run goes on; TensorBoard drops what was recorded
        after it, W&B keeps that and drops what is sent again."""
        self._trackers: list[Any] = []
        directory = Path(config.output.directory)
        for name in config.logging.trackers:
            directory.mkdir(parents=True, exist_ok=True)
            start = _tensorboard if name == "tensorboard" else _wandb
            self._trackers.append(start(config, directory, first_iteration))

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(figures), step=iteration)

    def log_pictures(self, iteration: int, pictures: Mapping[str, Image]) -> None:
        from numpy import asarray

        for name, picture in pictures.items():
            small = picture.copy()
            small.thumbnail((PICTURE_PX, PICTURE_PX))
            for tracker in self._trackers:
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: asarray(small)[None]}, step=iteration, **form)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _tensorboard(config: Config, directory: Path, first_iteration: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    purge = first_iteration + 1 if first_iteration else None
    tracker = TensorBoardTracker(LOGS, str(directory), purge_step=purge)
    tracker.start()
    return tracker


def _wandb(config: Config, directory: Path, first_iteration: int) -> Any:
    """A resumed run goes on as the same run there, whose name its folder holds."""
    import wandb
    from accelerate.tracking import WandBTracker

    name_file = directory / WANDB_ID
    run_id = name_file.read_text(encoding="utf-8").strip() if name_file.exists() else ""
    if not run_id:
        run_id = uuid.uuid4().hex[:12]
        write_text(name_file, run_id + "\n")
    tracker = WandBTracker(
        config.logging.project,
        id=run_id,
        resume="allow",
        name=directory.resolve().name,
        dir=str(directory),
        config=config.recipe_settings(),
        allow_val_change=True,
    )
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise ValueError(
            f"Weights & Biases does not start ({error}); run wandb login, set WANDB_MODE=offline, "
            'or remove "wandb" from logging.trackers.'
        ) from error
    return tracker
