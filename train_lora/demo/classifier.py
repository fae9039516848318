"""The small network that looks at pictures for the metrics: what is in them, and 64 features.

Trained on drawn scenes by `make_classifier.py`; it never sees a generated picture.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from .scenes import ATTRIBUTES

FEATURES = 64
WEIGHTS_FILE = Path(__file__).parent / "weights" / "classifier.safetensors"


class SceneClassifier(nn.Module):
    """Strided convolutions, one 64-wide feature layer, one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 64)
        stages = []
        for narrow, wide in pairwise(widths):
            stages += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, 128, 128) in [-1, 1] -> (B, 64) float32."""
        return nn.functional.silu(self.body(images.float()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per attribute, each (B, number of its values)."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def load_classifier(path: Path = WEIGHTS_FILE) -> SceneClassifier:
    """The trained classifier, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    model = SceneClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def recognised(classifier: SceneClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each captioned attribute is seen: (B, 6) float32, NaN where the caption is silent.

    images: (B, 3, 128, 128) in [-1, 1]; labels: (B, 6) from `scenes.labels`, -1 where open.
    """
    seen = torch.stack([logits.argmax(1) for logits in classifier(images).values()], 1)
    return torch.where(labels >= 0, (seen == labels).float(), torch.nan)
