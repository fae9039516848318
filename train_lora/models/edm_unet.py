"""The ADM UNet (arXiv 2105.05233) as EDM uses it (arXiv 2206.00364, table 7): class-conditional.

Pixels in, pixels out. Parameter names and layouts are those of the published ImageNet-64
checkpoint, so its weights load as they are. No dropout: DMD2's settings name none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_FACTOR = 4
"""The embedding of noise level and class is this many times `width` wide."""
_MAX_PERIOD = 10000.0
_GROUPS, _MIN_GROUP = 32, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EDMConfig:
    """The size of the network; the defaults are the published ImageNet-64 network (296M)."""

    resolution_px: int = 64
    """Side of the images."""
    channels: int = 3
    """Of the images; values in [-1, 1]."""
    classes: int = 1000
    """Number of class labels; 0 for a network without."""
    width: int = 192
    """Channels at full resolution, before the factor: a multiple of 32."""
    width_factors: tuple[int, ...] = (1, 2, 3, 4)
    """Of each level, from the full resolution down; each level halves the side."""
    blocks: int = 3
    """Residual blocks per level on the way down; one more on the way up."""
    attention_px: tuple[int, ...] = (32, 16, 8)
    """Sides at which the blocks have self-attention. The middle block has it anyway."""
    head_channels: int = 64
    """Channels of an attention head."""
    sigma_data: float = 0.5
    """Standard deviation of the training images' values."""

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32:
            raise ValueError(f"width is {self.width}: choose a multiple of 32, such as 192")
        if not self.width_factors or self.blocks < 1:
            raise ValueError(
                f"width_factors is {self.width_factors} and blocks is {self.blocks}: "
                "give at least one level and one block"
            )
        if self.resolution_px % 2 ** (len(self.width_factors) - 1):
            raise ValueError(
                f"resolution_px is {self.resolution_px}, which cannot be halved "
                f"{len(self.width_factors) - 1} times: use fewer width_factors"
            )
        for side in self.attention_px:
            if side not in self.sides_px:
                raise ValueError(
                    f"attention_px has {side}, but the levels have the sides {self.sides_px}"
                )
        for side, width in zip(self.sides_px, self.widths, strict=True):
            attends = side in self.attention_px or side == self.feature_px
            if attends and width % self.head_channels:
                raise ValueError(
                    f"head_channels is {self.head_channels}, which does not divide the "
                    f"{width} channels at side {side}: choose one that does"
                )

    @property
    def sides_px(self) -> tuple[int, ...]:
        """The side of the map at each level: 64, 32, 16, 8."""
        return tuple(self.resolution_px >> level for level in range(len(self.width_factors)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels at each level: 192, 384, 576, 768."""
        return tuple(self.width * factor for factor in self.width_factors)

    @property
    def feature_px(self) -> int:
        """Side of the middle block's map."""
        return self.sides_px[-1]

    @property
    def feature_channels(self) -> int:
        """Channels of the middle block's map."""
        return self.widths[-1]


class ResidualBlock(nn.Module):
    """Norm, SiLU, (resampling,) 3x3; norm with scale and shift from the embedding, SiLU, 3x3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        resample: Literal["up", "down"] | None = None,
        head_channels: int | None = None,
    ) -> None:
        """`head_channels`: of the self-attention that follows; None for a block without."""
        super().__init__()
        self.resample = resample
        self.norm0 = _norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * out_channels)
        self.norm1 = _norm(out_channels)
        self.conv1 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.num_heads = 0
        if head_channels is not None:
            self.num_heads = out_channels // head_channels
            self.norm2 = _norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = _zero(nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x`: (B, in, H, W); `embedding`: (B, 4 * width) -> (B, out, H', W')."""
        hidden = self.conv0(self._resampled(F.silu(self.norm0(x))))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(self.norm1(hidden) * (1.0 + scale) + shift))
        x = self.skip(self._resampled(x)) + hidden
        return x + self._attention(x) if self.num_heads else x

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def _attention(self, x: Tensor) -> Tensor:
        """The published order of the 3C channels: head, then channel, then q, k or v."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.num_heads, -1, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)  # each (B, heads, H * W, head channels)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.proj(mixed.reshape(batch, channels, height, width))


class EDMUNet(nn.Module):
    """The raw network F(c_in * x, c_noise, class); `EDMNetwork` makes a denoiser of it."""

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputed: Callable[..., Tensor] | None = None
        """Gradient checkpointing: what runs a block where gradients are wanted; None: nothing."""
        embedding = EMBEDDING_FACTOR * config.width
        self.map_layer0 = nn.Linear(config.width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        if config.classes:
            self.map_label = nn.Linear(config.classes, embedding, bias=False)
            nn.init.normal_(self.map_label.weight)  # for a one-hot input: unit variance
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = self._build_encoder(embedding)
        self._build_decoder(embedding, skips)
        self.out_norm = _norm(config.widths[0])
        self.out_conv = _zero(nn.Conv2d(config.widths[0], config.channels, 3, padding=1))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """`x`: (B, channels, side, side); `noise`: (B,); `labels`: (B,) int64, None without classes
        -> (B, channels, side, side)."""
        embedding = self._embedding(noise, labels)
        x, skips = self._encode(x, embedding)
        x = self._middle(x, embedding)
        for name, block in self.dec.items():
            if _is_middle(name):
                continue
            if not name.endswith("_up"):
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))

    def features(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The middle block's output (B, feature_channels, feature_px, feature_px): no decoder."""
        embedding = self._embedding(noise, labels)
        return self._middle(self._encode(x, embedding)[0], embedding)

    @property
    def feature_blocks(self) -> list[nn.Module]:
        """The last block of each level on the way down, and of the middle."""
        config = self.config
        last = [f"{side}x{side}_block{config.blocks - 1}" for side in config.sides_px]
        middle = f"{config.feature_px}x{config.feature_px}_in1"
        return [*(self.enc[name] for name in last), self.dec[middle]]

    def _build_encoder(self, embedding: int) -> list[int]:
        """Fills `enc`; returns the channels of every block, which the decoder takes up again."""
        config, channels = self.config, self.config.widths[0]
        skips = []
        for side, width in zip(config.sides_px, config.widths, strict=True):
            if side == config.resolution_px:
                self.enc[f"{side}x{side}_conv"] = nn.Conv2d(config.channels, width, 3, padding=1)
            else:
                self.enc[f"{side}x{side}_down"] = ResidualBlock(
                    channels, channels, embedding, resample="down"
                )
            skips.append(channels)
            for index in range(config.blocks):
                self.enc[f"{side}x{side}_block{index}"] = ResidualBlock(
                    channels, width, embedding, head_channels=self._heads(side)
                )
                channels = width
                skips.append(channels)
        return skips

    def _build_decoder(self, embedding: int, skips: list[int]) -> None:
        config, channels, skips = self.config, self.config.widths[-1], list(skips)
        for side, width in reversed(list(zip(config.sides_px, config.widths, strict=True))):
            if side == config.feature_px:
                self.dec[f"{side}x{side}_in0"] = ResidualBlock(
                    channels, channels, embedding, head_channels=config.head_channels
                )
                self.dec[f"{side}x{side}_in1"] = ResidualBlock(channels, channels, embedding)
            else:
                self.dec[f"{side}x{side}_up"] = ResidualBlock(
                    channels, channels, embedding, resample="up"
                )
            for index in range(config.blocks + 1):
                self.dec[f"{side}x{side}_block{index}"] = ResidualBlock(
                    channels + skips.pop(), width, embedding, head_channels=self._heads(side)
                )
                channels = width

    def _heads(self, side: int) -> int | None:
        return self.config.head_channels if side in self.config.attention_px else None

    def _embedding(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """(B, 4 * width); cosines first, as the published weights expect."""
        half = self.config.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=noise.device)
        angles = noise.float()[:, None] * _MAX_PERIOD ** (-steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(noise.dtype)
        embedding = self.map_layer1(F.silu(self.map_layer0(waves)))
        if labels is not None:
            embedding = embedding + F.embedding(labels, self.map_label.weight.t())
        return F.silu(embedding)

    def _encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for block in self.enc.values():
            x = self._run(block, x, embedding) if isinstance(block, ResidualBlock) else block(x)
            skips.append(x)
        return x, skips

    def _middle(self, x: Tensor, embedding: Tensor) -> Tensor:
        for name, block in self.dec.items():
            if _is_middle(name):
                x = self._run(block, x, embedding)
        return x

    def _run(self, block: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.recomputed is None or not torch.is_grad_enabled():
            return block(x, embedding)
        return self.recomputed(block, x, embedding)


def _is_middle(name: str) -> bool:
    return name.endswith(("_in0", "_in1"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(_GROUPS, channels // _MIN_GROUP), channels, eps=1e-5)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The last layer of a branch begins as nothing."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
