"""How good the demo's pictures are: quality, obedience to the prompt, variety, cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2_core import derived_seed

from ..metrics.diversity import diversity
from ..metrics.frechet import frechet_distance
from . import scenes
from .classifier import SceneClassifier, recognised

NUM_PROMPTS, SEEDS_PER_PROMPT = 64, 4
NUM_REAL = 2048
PROMPT_SEED, REAL_SEED = derived_seed(101), derived_seed(102)  # no training data has these seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemFigures:
    """One system's row of the table; field names are those of report.json."""

    frechet_distance: float
    """Of classifier features to those of real scenes for the same prompts; lower is better."""
    prompt_accuracy: float
    """Share of the captioned attributes that the classifier recognises."""
    diversity: float
    """Mean feature distance between pictures of one prompt."""
    network_evaluations: int
    """Of the UNet for each picture; guidance doubles them."""
    seconds_per_image: float
    """UNet and VAE, in batches, on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """What every system is measured with: the classifier, prompts never trained on, real scenes."""

    classifier: SceneClassifier
    scenes: list[scenes.Scene]
    """NUM_PROMPTS scenes, each SEEDS_PER_PROMPT times in a row."""
    real_features: Tensor

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    def measure(self, render: Callable[[], Tensor], network_evaluations: int) -> SystemFigures:
        """`render` gives one image for each of `captions`: (256, 3, 128, 128) in [-1, 1]."""
        started = time.perf_counter()
        images = render()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            features = self.classifier.features(images)
        hits = recognised(self.classifier, images, scenes.labels(self.scenes))
        return SystemFigures(
            frechet_distance=frechet_distance(features, self.real_features),
            prompt_accuracy=float(hits.nanmean()),
            diversity=diversity(features.view(-1, SEEDS_PER_PROMPT, features.shape[1])),
            network_evaluations=network_evaluations,
            seconds_per_image=seconds / len(images),
        )


def evaluation_scenes(seed: int = PROMPT_SEED) -> list[scenes.Scene]:
    """The NUM_PROMPTS scenes whose captions every system is measured on."""
    return scenes.random_scenes(NUM_PROMPTS, torch.Generator().manual_seed(seed))


@torch.no_grad()
def build_yardstick(
    classifier: SceneClassifier, num_real: int = NUM_REAL, *, prompt_seed: int = PROMPT_SEED
) -> Yardstick:
    """Draw the prompts, and real scenes for the same prompts: the same ones every time.

    Real scenes of the same prompts, so that the distance speaks of the pictures and not of which
    prompts happened to be asked: 256 real pictures are at a distance of about 12 from the rest.
    """
    prompts = evaluation_scenes(prompt_seed)
    generator = torch.Generator().manual_seed(REAL_SEED)
    features = [
        classifier.features(scenes.draw(prompts, generator)) for _ in range(num_real // NUM_PROMPTS)
    ]
    repeated = [scene for scene in prompts for _ in range(SEEDS_PER_PROMPT)]
    return Yardstick(classifier=classifier, scenes=repeated, real_features=torch.cat(features))
