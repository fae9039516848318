"""From `config.model`, `config.student` and `config.critic` to networks that are ready to train."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .adversary import chosen_layers
from .config import Config
from .config_classes import has_classes
from .models.components import Components
from .models.precision import DTYPES, Precision, check_precision, import_bitsandbytes
from .models.roles import CRITIC, STUDENT, FullSpec, LoraSpec, SharedUNet
from .optimizer import check_optimizer
from .sharding import shard_copies

if TYPE_CHECKING:
    from dmd2_core import Recipe

log = logging.getLogger(__name__)

WARM_START_NOTICE = (
    "warm start of the student from %s: what is trained from it inherits its licence. The "
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

    Where a full copy will be trained, all of the file's precision is kept for it. ValueError for a
    model that is not of the kind, captions or classes, that `data.prompts` says.
    """
    components = _load(config, device)
    _check_kind(config, components)
    return components


def _load(config: Config, device: torch.device | None) -> Components:
    import_bitsandbytes()
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


def _check_kind(config: Config, components: Components) -> None:
    classes, side_px = has_classes(config), config.data.resolution_px
    if classes != (components.kind == "edm"):
        is_told, instead = ("captions", "those") if classes else ("classes", '"classes"')
        raise ValueError(
            f"data.prompts is {config.data.prompts!r}, but the model {config.model.path} is told "
            f"{is_told}; set data.prompts to {instead}, or name another model."
        )
    if classes and side_px != components.side_px:
        raise ValueError(
            f"data.resolution_px is {side_px}, but the model {config.model.path} draws pictures of "
            f"{components.side_px} px; set it to {components.side_px}."
        )


def autocast_dtype(config: Config) -> torch.dtype | None:
    """Of every pass through the UNet; None: it computes in its own precision."""
    return torch.bfloat16 if config.training.mixed_precision == "bf16" else None


def build_unet(
    config: Config,
    components: Components,
    device: torch.device,
    *,
    roles: Sequence[str] = (STUDENT, CRITIC),
) -> SharedUNet:
    """The teacher and the `roles` as the config wants them; the student starts cold.

    Still on the CPU, meant for `device`: move it once the encoders have done their work there.
    """
    sections = {STUDENT: config.student, CRITIC: config.critic}
    specs = {
        role: FullSpec()
        if sections[role].kind == "full"
        else LoraSpec(rank=sections[role].rank, alpha=sections[role].alpha)
        for role in roles
    }
    if config.student.kind == "full" and components.kind != "edm":
        from .models.saving import check_conventions

        check_conventions(components)  # it is exported as a single file, hours from now
    unet = SharedUNet(
        components.unet,
        specs,
        seed=config.training.seed,
        precision=base_precision(config, device),
        autocast=autocast_dtype(config),
    )
    return unet


def build_trainable_unet(
    config: Config, components: Components, device: torch.device, *, warm: bool
) -> SharedUNet:
    """`build_unet` as training runs it; `warm`: from `student.init`, where there is one.

    With several processes full copies are sharded, and this process's part is on `device` already.
    """
    check_optimizer(config.training.optimizer)
    told = config.sampling.conditioning_timestep
    if told is not None and components.prediction == "flow":
        raise ValueError(
            f"sampling.conditioning_timestep is {told}, but {components.name} predicts flow, which "
            "gives a picture from pure noise as it is, and no program would tell it another time: "
            'set it to "none".'
        )
    unet = build_unet(config, components, device)
    if config.gan.enabled:
        chosen_layers(config.gan, unet.layers)
    if warm and config.student.init is not None:
        warm_start(unet, config.student.init, components)
    if config.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.training.compile:
        unet.compile_blocks()
    shard_copies(unet, device)
    return unet


def warm_start(unet: SharedUNet, path: str, components: Components) -> None:
    """Give the student the LoRA at `path`; ValueError if it belongs to another kind of model."""
    from .export import load_lora_into
    from .lora_files import read_lora

    _, recipe = read_lora(path)
    if recipe is not None:
        check_same_prediction(path, recipe, components, "student.init")
    load_lora_into(unet, path, STUDENT)
    log.info(WARM_START_NOTICE, path)


def check_same_prediction(path: str, recipe: Recipe, components: Components, option: str) -> None:
    """ValueError naming `option` if the LoRA at `path` was trained on another kind of output."""
    theirs = (recipe.prediction, recipe.zero_terminal_snr)
    ours = (components.prediction, components.schedule.has_zero_terminal_snr)
    if theirs != ours:

        def words(prediction: str, zero_snr: bool) -> str:
            return prediction + (" with zero terminal SNR" if zero_snr else "")

        raise ValueError(
            f"{option} {path} was trained for a model that predicts {words(*theirs)}, but "
            f"{components.name} predicts {words(*ours)}: use a LoRA of the same prediction type."
        )
