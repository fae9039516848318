"""From `config.model`, `config.student` and `config.critic` to networks that are ready to train."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .config import Config
from .models.components import Components
from .models.precision import DTYPES, Precision, check_precision
from .models.roles import CRITIC, STUDENT, FullSpec, LoraSpec, SharedUNet

if TYPE_CHECKING:
    from dmd2_core import Recipe

WARM_START_NOTICE = (
    "Warm start of the student from {path}: what is trained from it inherits its licence. The "
    "published DMD2 weights are non-commercial (CC BY-NC 4.0); leave student.init out for a LoRA "
    "that carries no licence but the base model's."
)


def base_precision(config: Config, device: torch.device) -> Precision:
    """What the frozen base is stored in; "auto" follows the device and the mixed precision."""
    chosen = config.model.base_precision
    if chosen != "auto":
        return chosen
    mixed = config.training.mixed_precision == "bf16"
    return "bf16" if mixed and device.type != "cpu" else "fp32"


def load_model(config: Config, device: torch.device | None = None) -> Components:
    """The model of `config.model` on the CPU, loaded for a base on `device` (None: the CPU).

    Where a full copy will be trained, all of the file's precision is kept for it.
    """
    device = device or torch.device("cpu")
    precision = base_precision(config, device)
    check_precision(precision, device, "model.base_precision")
    if config.model.path == "demo":
        from .demo.teacher import load_teacher

        return load_teacher()
    from .models.loading import load_components

    full = "full" in (config.student.kind, config.critic.kind)
    dtype = torch.float32 if full else DTYPES[precision]
    return load_components(config.model.path, dtype=dtype, prediction=config.model.prediction)


def build_unet(config: Config, components: Components, device: torch.device) -> SharedUNet:
    """The teacher with the roles of student and critic, as the config wants them.

    Still on the CPU, meant for `device`: move it once the encoders have done their work there.
    """
    settings = config.training
    specs = {
        role: FullSpec()
        if section.kind == "full"
        else LoraSpec(rank=section.rank, alpha=section.alpha)
        for role, section in ((STUDENT, config.student), (CRITIC, config.critic))
    }
    if config.student.kind == "full":
        from .models.saving import check_conventions

        check_conventions(components)  # it is exported as a single file, hours from now
    unet = SharedUNet(
        components.unet,
        specs,
        seed=settings.seed,
        precision=base_precision(config, device),
        autocast=torch.bfloat16 if settings.mixed_precision == "bf16" else None,
    )
    if config.student.init is not None:
        warm_start(unet, config.student.init, components)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.compile:
        unet.compile_blocks()
    return unet


def warm_start(unet: SharedUNet, path: str, components: Components) -> None:
    """Give the student the LoRA at `path`; ValueError if it belongs to another kind of model."""
    from .export import load_lora_into
    from .lora_files import read_lora

    _, recipe = read_lora(path)
    if recipe is not None:
        _check_same_prediction(path, recipe, components)
    load_lora_into(unet, path, STUDENT)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(WARM_START_NOTICE.format(path=path), file=sys.stderr)


def _check_same_prediction(path: str, recipe: Recipe, components: Components) -> None:
    theirs = (recipe.prediction, recipe.zero_terminal_snr)
    ours = (components.prediction, components.schedule.has_zero_terminal_snr)
    if theirs != ours:

        def words(prediction: str, zero_snr: bool) -> str:
            return prediction + (" with zero terminal SNR" if zero_snr else "")

        raise ValueError(
            f"student.init {path} was trained for a model that predicts {words(*theirs)}, but "
            f"{components.name} predicts {words(*ours)}: use a LoRA of the same prediction type"
        )
