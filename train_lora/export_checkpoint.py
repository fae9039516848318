"""`dmd2 export`: a LoRA file from a checkpoint, also of a training that is still running.

Beside an EDM teacher the file is the whole student.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .best import best_checkpoint
from .checkpoint import AVERAGE, read_state
from .checkpoint_store import MANIFEST, checkpoints, damage, newest_complete
from .config_load import from_dict
from .finish import export_student, thumbnail_condition
from .model_setup import build_unet, load_model
from .models.roles import STUDENT
from .models.safetensors_io import read_safetensors

NEWEST, BEST = "newest", "best"
"""Which checkpoint of a run: the newest complete one, or the best by its validation figure."""


def export_checkpoint(source: Path, out: Path, which: str | None = None) -> list[Path]:
    """Write the averaged student of a checkpoint to `out`.

    `source`: a checkpoint's folder, or that of a run, of which `which` is taken: `NEWEST` (None
    means it too), `BEST`, or an iteration such as "500".

    The file is the one that the training would write at that iteration (its picture, which is
    drawn anew, to the last bit only on the same kind of device); a full student's whole checkpoint
    goes beside it. On the CPU; the base model is refused if it is not the run's.
    """
    checkpoint = _find(source, which)
    state = read_state(checkpoint)
    config = from_dict(state["config"])
    components = load_model(config)
    expected = state["matches"]["base model's hash"]
    if components.base_hash != expected:
        raise ValueError(
            f"{config.model.path} is not the model that {checkpoint} was trained on (its hash is "
            f"{components.base_hash[:12]}, not {expected[:12]}); put that one back."
        )
    device = torch.device("cpu")
    unet = build_unet(config, components, device, roles=(STUDENT,)).to(device)
    weights, _ = read_safetensors(checkpoint / f"{AVERAGE}.safetensors")
    unet.load_role_state_dict(STUDENT, weights)
    pictured = None
    if config.export.thumbnail:
        pictured = thumbnail_condition(config, components, state["caption"])
    return export_student(
        config,
        components,
        unet,
        out,
        whole=out if components.kind == "edm" else out.with_stem(f"{out.stem}_full"),
        iterations=state["iteration"],
        earlier=state.get("earlier"),
        pictured=pictured,
    )


def _find(source: Path, which: str | None) -> Path:
    if (source / MANIFEST).is_file():
        if which is not None:
            raise ValueError(
                f"--checkpoint is {which!r}, but {source} is one checkpoint already; remove "
                "--checkpoint, or name the run's folder."
            )
    elif which == BEST:
        source = best_checkpoint(source)
    elif which is None or which == NEWEST:
        return newest_complete(source)
    else:
        source = _of_iteration(source, which)
    reason = damage(source)
    if reason is not None:
        raise ValueError(f"The checkpoint {source} is damaged: {reason}. Export another one.")
    return source


def _of_iteration(run: Path, which: str) -> Path:
    found = {int(folder.name): folder for folder in checkpoints(run)}
    if not which.isdecimal() or int(which) not in found:
        have = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(
            f"--checkpoint is {which!r}; name {NEWEST}, {BEST}, or an iteration that {run} has a "
            f"checkpoint of ({have})."
        )
    return found[int(which)]
