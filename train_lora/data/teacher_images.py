"""`data.real_images = "teacher"`: the teacher draws the GAN's images, straight as latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dmd2_core import StepPlan, derived_seed

from ..config import Config
from ..model_setup import autocast_dtype
from ..models.components import Components
from ..models.roles import TEACHER, SharedUNet
from ..models.text import encode_prompts
from ..sampling import TEACHER_STEPS, sample_latents
from .encode import UNIT_PICTURES, Encoded, Part, Unit, digest
from .images import bucket_ids
from .order import shuffled_indices
from .sizes import Size

PROMPT_SEED, NOISE_SEED = range(100, 102)


def teacher_units(
    config: Config,
    components: Components,
    captions: Sequence[str],
    sizes: Sequence[Size],
    teacher: SharedUNet | None,
) -> Iterator[Unit]:
    """`data.teacher_images` images of shuffled training captions, 50 guided steps each.

    The sizes take turns from unit to unit. Image i is a function of (seed, i) alone, whatever the
    number of processes. `teacher`: the UNet in its roles, where training has made them already.
    """
    count, seed = config.data.teacher_images, config.training.seed
    rows = shuffled_indices(len(captions), 0, count, derived_seed(seed, PROMPT_SEED))
    chosen = [captions[row] for row in rows.tolist()]
    # Every size gets its turn even where there are fewer images than units of full length.
    step = max(1, min(UNIT_PICTURES, count // len(sizes)))
    for number, first in enumerate(range(0, count, step)):
        size, piece = sizes[number % len(sizes)], chosen[first : first + step]

        def encode(first: int = first, size: Size = size, piece: list[str] = piece) -> Encoded:
            return _draw(config, components, piece, first, size, teacher)

        def stamp(first: int = first, size: Size = size, piece: list[str] = piece) -> str:
            return digest([str(first), str(size), *piece])

        yield Unit(stamp=stamp, encode=encode)


def _draw(
    config: Config,
    components: Components,
    captions: list[str],
    first: int,
    size: Size,
    teacher: SharedUNet | None,
) -> Encoded:
    seed = derived_seed(config.training.seed, NOISE_SEED)
    latents = teacher_latents(config, components, captions, first, size, teacher, seed=seed)
    ids = torch.tensor([bucket_ids(size)] * len(captions)).float()
    part = Part(columns={"latents": latents, "ids": ids}, captions=captions)
    return Encoded(parts={str(size): part})


def teacher_latents(
    config: Config,
    components: Components,
    captions: Sequence[str],
    first: int,
    size: Size,
    teacher: SharedUNet | None,
    *,
    seed: int,
    steps: int = TEACHER_STEPS,
) -> Tensor:
    """The teacher's deterministic, guided samples: (n, 4, H/8, W/8) float32 on the CPU.

    Sample i starts from `initial_noise` of (seed, first + i).
    """
    unet = teacher or SharedUNet(components.unet, {}, seed=0, autocast=autocast_dtype(config))
    unet.to(components.vae.device)
    batch, latents = config.training.batch_size, []
    for start in range(0, len(captions), batch):
        condition = encode_prompts(
            components, list(captions[start : start + batch]), size.height_px, size.width_px
        )
        drawn = sample_latents(
            unet,
            TEACHER,
            components,
            condition,
            StepPlan.evenly(steps),
            seed=seed,
            first_index=first + start,
            guidance=config.distribution_matching.guidance,
            strength=0.0,
        )
        latents.append(drawn.float().cpu())
    return torch.cat(latents)
