"""`dmd2 export`: a LoRA file from a checkpoint, also of a training that is still running."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import AVERAGE, read_state
from .checkpoint_store import MANIFEST, damage, newest_complete
from .config_load import from_dict
from .export import export_lora
from .models.roles import STUDENT, LoraSpec, SharedUNet
from .models.safetensors_io import read_safetensors
from .trainer import load_model, recipe_of


def export_checkpoint(source: Path, out: Path) -> None:
    """Write the averaged student of a checkpoint, or of a run's newest complete one, to `out`.

    The file is the one that the training would write at that iteration. On the CPU; the base
    model is loaded for its architecture, and refused if it is not the run's.
    """
    checkpoint = _find(source)
    state = read_state(checkpoint)
    config = from_dict(state["config"])
    components = load_model(config)
    expected = state["matches"]["base model's hash"]
    if components.base_hash != expected:
        raise ValueError(
            f"{config.model.path} is not the model that {checkpoint} was trained on (its hash is "
            f"{components.base_hash[:12]}, not {expected[:12]}); put that one back."
        )
    spec = LoraSpec(rank=config.student.rank, alpha=config.student.alpha)
    unet = SharedUNet(components.unet, {STUDENT: spec}, seed=0)
    weights, _ = read_safetensors(checkpoint / f"{AVERAGE}.safetensors")
    unet.load_role_state_dict(STUDENT, weights)
    export_lora(unet, STUDENT, out, recipe_of(config, components, state["iteration"]))


def _find(source: Path) -> Path:
    if not (source / MANIFEST).is_file():
        return newest_complete(source)
    reason = damage(source)
    if reason is not None:
        raise ValueError(f"The checkpoint {source} is damaged: {reason}. Export another one.")
    return source
