"""An EDM network as a teacher: how it is run in a role, and its parts as a model.

Training counts its noise levels as the steps 0 .. 999 of `SteppedSchedule.edm()`, as it does for
every model; the network's passes are where a step becomes sigma.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dmd2_core import Recipe, SteppedSchedule

from .class_condition import ClassCondition
from .components import Components
from .edm_network import EDMNetwork, load_edm
from .fingerprint import weights_hash
from .passes import MIDDLE, LayerShape
from .safetensors_io import read_safetensors

_CHANNELS = 3


class EDMPasses(nn.Module):
    """`Passes` of an EDM network: told steps and classes, pixels in and out."""

    METHODS = ("features", "with_features")

    def __init__(self, unet: EDMNetwork) -> None:
        super().__init__()
        self.unet = unet
        self.schedule = SteppedSchedule.edm()

    def inputs(
        self, x_t: Tensor, condition: ClassCondition, autocast: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """What every pass takes beside t. x_t stays float32: it goes into the result as it is
        (c_skip * x_t); only the raw network is under autocast."""
        return x_t.float(), condition.labels

    @property
    def layers(self) -> dict[str, LayerShape]:
        """The maps that can be had: of the levels of the way down, from the full resolution, and of
        the middle block; in ImageNet-64 the last two have 768 channels at 8x8."""
        config = self.unet.config
        scales = [config.resolution_px // side for side in config.sides_px]
        shapes = [LayerShape(*shape) for shape in zip(config.widths, scales, strict=True)]
        return {f"down{n}": shape for n, shape in enumerate(shapes, 1)} | {MIDDLE: shapes[-1]}

    def forward(self, sample: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x0 like `sample`, (B, 3, side, side); t: (B,) steps 0 .. 999, labels: (B,) int64."""
        output: Tensor = self.unet(sample, self.schedule.time(t), labels)
        return output

    def features(
        self, sample: Tensor, t: Tensor, labels: Tensor, layers: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) of `layers`: half the network, no decoder."""
        with self._kept() as found:
            self.unet.features(sample, self.schedule.time(t), labels)
        return tuple(found[name] for name in layers)

    def with_features(
        self, sample: Tensor, t: Tensor, labels: Tensor, layers: Sequence[str]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `forward` and `features` give, in one pass of the network."""
        with self._kept() as found:
            output = self.forward(sample, t, labels)
        return output, tuple(found[name] for name in layers)

    @contextmanager
    def _kept(self) -> Iterator[dict[str, Tensor]]:
        """The maps of the passes inside, by name."""
        found: dict[str, Tensor] = {}
        blocks = dict(zip(self.layers, self.unet.model.feature_blocks, strict=True))
        with ExitStack() as hooks:
            for name, block in blocks.items():

                def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                    found[name] = output

                hooks.callback(block.register_forward_hook(keep).remove)
            yield found


class PixelVAE(nn.Module):
    """The identity, with the interface of a VAE: pixels are the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.place = nn.Parameter(torch.zeros(0))  # where the data belong

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=images))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (latents,)


def is_edm_file(path: Path) -> bool:
    """Whether the file holds what `dmd2 convert-edm` writes, whole or not."""
    return "model.map_layer0.weight" in read_safetensors(path)[0]


def load_edm_components(path: Path, name: str) -> Components:
    """The network of a file as a model, float32 on the CPU; ValueError if it cannot be a teacher.

    A student's file is a model as well: `Components.recipe` says how it is sampled.
    """
    network = load_edm(path)
    config = network.config
    if config.classes == 0 or config.channels != _CHANNELS:
        raise ValueError(
            f"{path} is an EDM network of {config.classes} classes and {config.channels} channels: "
            "give one that draws coloured pictures of classes, such as edm-imagenet-64x64-cond-adm"
        )
    vae = PixelVAE()
    vae.requires_grad_(False)
    return Components(
        unet=network,
        vae=vae,
        text_encoders=[],
        tokenizers=[],
        schedule=SteppedSchedule.edm(),
        prediction="sample",
        kind="edm",
        base_hash=weights_hash(network.state_dict()),
        name=name,
        recipe=Recipe.from_metadata(read_safetensors(path)[1]),
    )


def encode_classes(
    components: Components, captions: Sequence[str], resolution_px: int
) -> ClassCondition:
    """Class numbers, written as text, as the network is told them; on the VAE's device.

    ValueError for what is no class of the network, and for another size than its own.
    """
    config = components.unet.config
    for caption in captions:
        if not caption.isdecimal() or int(caption) >= config.classes:
            raise ValueError(
                f"{caption!r} is no class of {components.name}: it draws the classes 0 to "
                f"{config.classes - 1}; write such a number in place of a prompt"
            )
    if resolution_px != config.resolution_px:
        raise ValueError(
            f"{components.name} draws pictures of {config.resolution_px} px, not {resolution_px}: "
            f"set the size to {config.resolution_px}"
        )
    labels = torch.tensor([int(caption) for caption in captions])
    return ClassCondition(labels=labels.to(components.vae.device), side_px=resolution_px)
