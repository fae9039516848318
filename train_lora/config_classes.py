"""Options beside a teacher of classes (`data.prompts` "classes"): what is refused or has no effect.

Such a teacher is an EDM network (docs/imagenet.md): pixels, no captions, no unconditional branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .config_section import show_value
from .data.settings import CLASSES

if TYPE_CHECKING:
    from .config import Config

_BECAUSE = f'data.prompts is "{CLASSES}"'
_IDLE = (
    *("prompt_column", "caption_column", "image_column", "split", "stream", "sizes", "size_ids"),
    *("skip_small_buckets", "teacher_images", "text", "cache"),
)


def has_classes(config: Config) -> bool:
    return config.data.prompts == CLASSES


def check_classes(config: Config) -> None:
    """ValueError for what cannot be done beside such a teacher; nothing for any other."""
    if not has_classes(config):
        return
    for section in ("student", "critic"):
        if getattr(config, section).kind != "full":
            raise ValueError(
                f'{section}.kind is "lora", but {_BECAUSE}, and an EDM network takes no LoRA; set '
                f'{section}.kind to "full".'
            )
    matching = config.distribution_matching
    if matching.enabled and matching.guidance != 1:
        raise ValueError(
            f"distribution_matching.guidance is {matching.guidance}, but {_BECAUSE}, and an EDM "
            "network has no unconditional branch to guide by; set it to 1."
        )
    if matching.guidance_timesteps != "shared":
        raise ValueError(
            f'distribution_matching.guidance_timesteps is "{matching.guidance_timesteps}", but '
            f'{_BECAUSE}, and an EDM network is not guided; set it to "shared".'
        )
    if config.sampling.conditioning_timestep is not None:
        raise ValueError(
            f"sampling.conditioning_timestep is {config.sampling.conditioning_timestep}, but "
            f"{_BECAUSE}, and an EDM network in one step is told the noise level it sees; set it "
            'to "none".'
        )
    if config.needs_pairs:
        raise ValueError(
            f"regression.warmup_iterations is {config.regression.warmup_iterations} and "
            f'training.objective is "{config.training.objective}", but {_BECAUSE}, and pairs are '
            'made of captions; set them to 0 and "dmd2".'
        )
    if config.critic.loss_space != "prediction":
        raise ValueError(
            f'critic.loss_space is "{config.critic.loss_space}", but {_BECAUSE}, and the critic of '
            'an EDM network has a weighting of its own; set it to "prediction".'
        )
    if config.model.base_precision in ("8bit", "4bit"):
        raise ValueError(
            f'model.base_precision is "{config.model.base_precision}", but {_BECAUSE}, and an EDM '
            'network has no layers to quantise; set it to "auto".'
        )
    if config.training.compile:
        raise ValueError(
            f"training.compile is true, but {_BECAUSE}, and an EDM network has no blocks that are "
            "compiled; set it to false."
        )
    source = config.data.real_images
    if config.needs_real_images and (
        source in ("demo", "teacher") or str(source).startswith("hub:")
    ):
        raise ValueError(
            f"data.real_images is {show_value(source)}, but {_BECAUSE}; name a folder with a "
            "folder of pictures for each class."
        )


def mark_classes(config: Config, mark: Callable[..., None]) -> None:
    """The keys that are without effect beside such a teacher."""
    if has_classes(config):
        keys = ("model.prediction", "student.rank", "export.names", *(f"data.{k}" for k in _IDLE))
        mark(keys, "data.prompts")
