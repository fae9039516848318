"""Pairs for the regression loss: noise, and what the teacher makes of it (arXiv 2311.18828, 3.2).

The teacher's sampler is deterministic, so that an image is a function of its noise; that function
is what the student learns to take in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dmd2_core import derived_seed, initial_noise

from ..config import Config
from ..models.components import Components
from ..models.text import LATENT_PX
from .encode import Encoded, Part, Unit, digest
from .order import shuffled_indices
from .sizes import Size
from .teacher_images import teacher_latents

UNIT_PAIRS = 32
PROMPT_SEED, NOISE_SEED = range(200, 202)


def pair_units(config: Config, components: Components, captions: Sequence[str]) -> Iterator[Unit]:
    """`regression.num_pairs` pairs of shuffled training captions, at the model's square size.

    Pair i is a function of (seed, i) alone, whatever the number of processes.
    """
    count, seed = config.regression.num_pairs, config.training.seed
    rows = shuffled_indices(len(captions), 0, count, derived_seed(seed, PROMPT_SEED))
    chosen = [captions[row] for row in rows.tolist()]
    for first in range(0, count, UNIT_PAIRS):
        piece = chosen[first : first + UNIT_PAIRS]

        def encode(first: int = first, piece: list[str] = piece) -> Encoded:
            return _pairs(config, components, piece, first)

        def stamp(first: int = first, piece: list[str] = piece) -> str:
            return digest([str(first), *piece])

        yield Unit(stamp=stamp, encode=encode)


def _pairs(config: Config, components: Components, captions: list[str], first: int) -> Encoded:
    """Columns noise and latents, (n, 4, H/8, W/8) each."""
    size, seed = (
        Size.square(config.data.resolution_px),
        derived_seed(config.training.seed, NOISE_SEED),
    )
    latents = teacher_latents(
        config, components, captions, first, size, None,
        seed=seed, steps=config.regression.teacher_steps,
    )  # fmt: skip
    cells = size.height_px // LATENT_PX, size.width_px // LATENT_PX
    noise = initial_noise((len(captions), latents.shape[1], *cells), seed, first_index=first)
    columns = {"noise": noise, "latents": latents}
    return Encoded(parts={str(size): Part(columns=columns, captions=captions)})
