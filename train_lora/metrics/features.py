"""Networks that turn pictures into feature vectors, for the Frechet distance and its like."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .weights import read_weights

INCEPTION_SOURCE = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
DEMO = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """One network, ready on its device."""

    side_px: int
    """Side of the square pictures that it takes."""
    width: int
    """Numbers in a feature vector."""
    features: Callable[[Tensor], Tensor]
    """(B, 3, side_px, side_px) uint8 -> (B, width) float32."""


def load_extractor(choice: str, device: torch.device) -> Extractor:
    """ "demo": the embedded classifier, offline; else a file of Inception's weights."""
    return _classifier(device) if choice == DEMO else _inception(Path(choice), device)


def _classifier(device: torch.device) -> Extractor:
    from ..demo.classifier import FEATURES, load_classifier
    from ..demo.scenes import IMAGE_PX

    network = load_classifier().to(device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return network.features(pictures.to(device).float() / 127.5 - 1)

    return Extractor(side_px=IMAGE_PX, width=FEATURES, features=features)


def _inception(path: Path, device: torch.device) -> Extractor:
    """The network that FID is defined with (2015-12-05, TensorFlow's), as torch-fidelity has it."""
    weights = read_weights(path, "--features", INCEPTION_SOURCE)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    safe = io.BytesIO()  # its constructor would unpickle anything, or download
    torch.save(weights, safe)
    safe.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], safe).to(device)
    except RuntimeError as error:
        raise ValueError(
            f"--features {str(path)!r} is not torch-fidelity's Inception; get {INCEPTION_SOURCE}."
        ) from error

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        (found,) = network(pictures.to(device))
        return found

    return Extractor(side_px=network.INPUT_IMAGE_SIZE, width=2048, features=features)
