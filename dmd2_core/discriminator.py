"""The discriminator's heads: one on middle-block features (DMD2, sec. 4.3), or several."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LAST_SIZE = 4
_MIN_GROUP = 16


def num_groups(channels: int) -> int:
    """Groups for GroupNorm: 32 as in the paper, fewer for narrow maps.

    The most, up to 32, that divide `channels` and leave 16 channels in a group. The last norm sees
    a 1x1 map, where a group of one channel would be normalised to a constant, and one of three to
    little more than signs.
    """
    most = max(1, min(32, channels // _MIN_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class MiddleBlockHead(nn.Module):
    """Middle-block features (B, channels, size, size) -> one logit per image.

    Conv 4x4 stride 2 -> GroupNorm -> SiLU until the map is 4x4 (three times for SDXL's 1280 x 32 x
    32, once for 8x8, never for 4x4), conv 4x4 stride 4 -> GroupNorm -> SiLU to 1x1, conv 1x1.
    """

    def __init__(
        self, channels: int, size: int, *, generator: torch.Generator | None = None
    ) -> None:
        """`size`: side of the map at the base resolution, 4 * 2^k; `generator` (CPU) draws the
        initial weights; without one they come from torch's global generator, as in any module."""
        super().__init__()
        num_halvings = int(math.log2(size / _LAST_SIZE)) if size >= _LAST_SIZE else -1
        if num_halvings < 0 or _LAST_SIZE * 2**num_halvings != size:
            raise ValueError(
                f"size is {size}: the middle block's map must be 4, 8, 16, 32, ... wide; "
                "use a resolution whose latents give that"
            )
        stages: list[nn.Module] = []
        for _ in range(num_halvings):
            stages += self._stage(channels, stride=2, padding=1)
        self.halvings = nn.Sequential(*stages)
        self.last = nn.Sequential(*self._stage(channels, stride=4, padding=0))
        self.logit = nn.Conv2d(channels, 1, kernel_size=1)
        if generator is not None:
            self._initialise(generator)

    def forward(self, features: Tensor) -> Tensor:
        """`features`: (B, channels, H, W), any floating dtype -> logits: (B,), float32.

        Maps of another size or aspect than `size` are averaged to 4x4 before the last stage.
        """
        hidden = self.halvings(features.to(self.logit.weight.dtype))
        if hidden.shape[-2:] != (_LAST_SIZE, _LAST_SIZE):
            hidden = F.adaptive_avg_pool2d(hidden, _LAST_SIZE)
        logits: Tensor = self.logit(self.last(hidden))
        return logits.flatten().float()

    @staticmethod
    def _stage(channels: int, *, stride: int, padding: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, kernel_size=4, stride=stride, padding=padding),
            nn.GroupNorm(num_groups(channels), channels),
            nn.SiLU(),
        ]

    def _initialise(self, generator: torch.Generator) -> None:
        """torch's default for convolutions (uniform within 1 / sqrt(fan_in)), from `generator`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = 1.0 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                assert module.bias is not None
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)


class LayerHeads(nn.Module):
    """A head per feature map -> one logit per image, the mean of theirs.

    Every head is a `MiddleBlockHead` for the size of its map. Adversarial distillation puts heads
    on several layers of the teacher (LADD, arXiv 2403.12015) and adds up their losses; the mean of
    the logits leaves a single logit, of the size of the paper's, for all that takes one.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], *, generator: torch.Generator | None = None
    ) -> None:
        """`shapes`: layer -> (channels, side of its map at the base resolution), in the order in
        which `forward` gets the maps; `generator` as for `MiddleBlockHead`."""
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: MiddleBlockHead(channels, side, generator=generator)
                for name, (channels, side) in shapes.items()
            }
        )

    def forward(self, *features: Tensor) -> Tensor:
        """`features`: a map (B, channels, H, W) for each layer -> logits: (B,), float32."""
        pairs = zip(self.heads.values(), features, strict=True)
        return torch.stack([head(found) for head, found in pairs]).mean(dim=0)
