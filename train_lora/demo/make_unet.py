"""Train the embedded teacher's UNet and text encoders on latents of drawn scenes.

    torchrun --nproc_per_node 2 -m train_lora.demo.make_unet VAE.safetensors OUT.safetensors

Epsilon prediction on SDXL's schedule, more often at high noise, 10% of the conditions zeroed (the
unconditional branch), exponential moving average of the weights. Only tokens that captions use
have rows in the token tables. Each process draws its own scenes; gradients are averaged in one flat
reduction. The same seed and number of processes give the same weights on one machine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmd2_core import VPSchedule, add_noise, k_sigma

from ..average import WeightAverage
from ..distributed import average_gradients
from ..models.text import token_ids
from ..models.tokenizer import build_tokenizers
from . import architecture, scenes
from .teacher import caption_vocabulary

DROP_CONDITION = 0.1
WEIGHT_RANGE = (0.5, 8.0)
LAYOUT_WEIGHT, LAYOUT_LIMIT = 0.2, 100.0


class Teacher(nn.Module):
    """UNet and both text encoders as one module, from token ids to predicted noise."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.unet = architecture.build_unet()
        self.encoder_l, self.encoder_g = architecture.build_text_encoders(vocabulary)

    def forward(self, x_t: Tensor, t: Tensor, ids_l: Tensor, ids_g: Tensor, keep: Tensor) -> Tensor:
        """x_t: (B, 4, 16, 16); t: (B,); ids: (B, 77) int64; keep: (B,) 0 or 1 -> noise like x_t."""
        first = self.encoder_l(ids_l, output_hidden_states=True)
        second = self.encoder_g(ids_g, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        size = float(scenes.IMAGE_PX)
        time_ids = torch.tensor([size, size, 0.0, 0.0, size, size]).expand(len(x_t), -1)
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        return self.unet(x_t, t, hidden * keep[:, None, None], added_cond_kwargs=added).sample


@torch.no_grad()
def draw_latents(
    vae: nn.Module, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latent means (N, 4, 16, 16), and token ids for both encoders, each (N, 77)."""
    latents, captions = [], []
    for start in range(0, count, 16):
        chunk = scenes.random_scenes(min(16, count - start), generator)
        images = scenes.draw(chunk, generator)
        latents.append(vae.encode(images).latent_dist.mean * architecture.LATENT_SCALE)
        captions += [scene.caption for scene in chunk]
    ids_l, ids_g = token_ids(build_tokenizers(), captions)
    return torch.cat(latents), ids_l, ids_g


def weighted_loss(error: Tensor, ratio: Tensor) -> Tensor:
    """Squared error of the predicted noise, with an eye on what text decides at high noise.

    error: (B, 4, 16, 16); ratio: (B,) sigma_t / alpha_t. A picture's mean colour and its layout are
    a few of the 1024 numbers, and only near t = 999 does the noise hide them. In plain squared
    error they weigh next to nothing, and background and place stay deaf to the caption. So the
    error's means over 4x4 blocks and over the whole picture count once more, in units of x0.
    """
    plain = ratio.clamp(*WEIGHT_RANGE) * error.square().mean((1, 2, 3))
    blocks = nn.functional.avg_pool2d(error, 4).square().mean((1, 2, 3))
    whole = error.mean((2, 3)).square().mean(1)
    layout = ratio.square().clamp(max=LAYOUT_LIMIT) * (blocks + whole)
    return (plain + LAYOUT_WEIGHT * layout).mean()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """The training set in memory: latents and both encoders' token ids, in compact numbers."""

    latents: Tensor
    ids_l: Tensor
    ids_g: Tensor

    def shuffled(self, generator: torch.Generator, batch: int) -> Iterator[Tensor]:
        """Endless batches of row numbers; every pass in an order of its own."""
        while True:
            order = torch.randperm(len(self.latents), generator=generator)
            yield from order.split(batch)[: len(order) // batch]


def prepare(vae: nn.Module, count: int, generator: torch.Generator, vocabulary: Tensor) -> Scenes:
    latents, *ids = draw_latents(vae, count, generator)
    ids_l, ids_g = (torch.searchsorted(vocabulary, rows) for rows in ids)
    return Scenes(latents=latents, ids_l=ids_l, ids_g=ids_g)


def train(
    model: Teacher, data: Scenes, generator: torch.Generator, *,
    steps: int, batch: int, peak_rate: float, quiet: bool,
) -> WeightAverage:  # fmt: skip
    """Cosine-annealed AdamW; returns the averaged weights."""
    schedule = VPSchedule.sdxl()
    parameters = list(model.parameters())
    average = WeightAverage(parameters, decay=0.998)
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0)
    started = time.time()
    for step, rows in zip(range(steps), data.shuffled(generator, batch), strict=False):
        annealed = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_rate * min(1, (step + 1) / 100) * annealed
        x0 = data.latents[rows]
        t = (1000 * (1 - torch.rand(batch, generator=generator) ** 2)).long().clamp(0, 999)
        eps = torch.randn(x0.shape, generator=generator)
        keep = (torch.rand(batch, generator=generator) >= DROP_CONDITION).float()
        x_t = add_noise(schedule, x0, eps, t)
        out = model(x_t, t, data.ids_l[rows], data.ids_g[rows], keep)
        loss = weighted_loss(out - eps, k_sigma(schedule, t).float())
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        if not quiet and (step % 100 == 0 or step == steps - 1):
            print(f"{step}: loss {loss:.4f} {time.time() - started:.0f} s", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init", type=Path, help="go on from the weights in this file")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="per process")
    parser.add_argument("--scenes", type=int, default=6000, help="per process")
    parser.add_argument("--peak-rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import load_file, save_file

    rank = int(os.environ.get("RANK", 0))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    vae = architecture.build_vae()
    vae.load_state_dict(load_file(args.vae))
    torch.manual_seed(args.seed)  # the same start on every rank
    vocabulary = caption_vocabulary()
    model = Teacher(len(vocabulary))
    if args.init:
        stored = load_file(args.init)
        stored.pop("vocabulary")
        model.load_state_dict(stored)
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank + 1)
    data = prepare(vae.eval(), args.scenes, generator, vocabulary)
    average = train(
        model, data, generator,
        steps=args.steps, batch=args.batch, peak_rate=args.peak_rate, quiet=rank > 0,
    )  # fmt: skip
    if rank == 0:
        with average.applied():
            save_file(model.state_dict() | {"vocabulary": vocabulary.int()}, args.out)


if __name__ == "__main__":
    main()
