"""The options of [regression]: the teacher's own images as what the student should draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import Section, number

WEIGHT_SOURCES = {
    "lpips": "https://download.pytorch.org/models/vgg16-397923af.pth (torchvision's VGG16, which "
    "losses use; alexnet-owt-7be5be79.pth there is smaller)",
    "latent-lpips": "https://huggingface.co/Mingguksky/elatentlpips, elatentlpips_ckpt/"
    "sdxl_latest_vgg16_tuned.pth (sd15_ for SD1.5; not for commercial use)",
}
"""Where the weights of each `regression.loss` are published, for messages."""
TINY_VAE_SOURCE = "https://huggingface.co/madebyollin/taesdxl (taesd for SD1.5)"


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig(Section):
    section: ClassVar[str] = "regression"

    warmup_iterations: int = number(0, low=0)
    """Iterations at the start that train the student on the teacher's pairs alone, before any
    critic: the paper's first stage of one-step SDXL. They count in `training.iterations`."""

    learning_rate: float = number(1e-5, low=0, high=1, open_low=True)
    """Learning rate of the student in these iterations."""

    weight: float = number(0.25, low=0, open_low=True)
    """Weight of the regression loss beside distribution matching, with training.objective "dmd"."""

    loss: Literal["mse", "lpips", "latent-lpips"] = "mse"
    """The distance to the teacher's image: squared error of latents; LPIPS of decoded pictures, as
    the papers have it; or LatentLPIPS plus the absolute error of latents, without a decoder."""

    lpips_weights: str | None = None
    """File of the LPIPS network. "lpips": torchvision's VGG16 or AlexNet; "latent-lpips": a file
    of the elatentlpips project made for this model's latents."""

    tiny_vae: str | None = None
    """A small decoder for "lpips" (TAESD, for SDXL TAESDXL): a .safetensors file, or a diffusers
    folder; none: the model's own VAE, which takes more time and memory."""

    pairs: str | None = None
    """Folder of (noise, teacher image) pairs that `dmd2 pairs` fills."""

    num_pairs: int = number(10_000, low=1)
    """How many pairs the teacher makes."""

    teacher_steps: int = number(50, low=1, high=1000)
    """Steps of its deterministic sampler (DDIM) for each; guidance is distribution matching's."""
