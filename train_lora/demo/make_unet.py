"""Train the embedded teacher's UNet on encoded scenes, with the text encoders frozen.

    torchrun --nproc_per_node 2 -m train_lora.demo.make_unet TEXT.safetensors OUT.safetensors \\
        LATENTS_0.safetensors LATENTS_1.safetensors

Epsilon prediction on SDXL's schedule, at first more often at high noise, where text is learned,
then with uniform timesteps (`make teacher` has both commands), 10% of the conditions zeroed (the
unconditional branch), exponential moving average of the weights. Process N learns from the N-th
file of latents; gradients are averaged in one flat reduction. The same seed and number of
processes give the same weights on one machine.
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
from . import architecture, scenes
from .make_latents import OPEN
from .make_text import TextEncoders, compact_ids

DROP_CONDITION = 0.1
WEIGHT_RANGE = (0.5, 8.0)
LAYOUT_WEIGHT, LAYOUT_LIMIT = 0.4, 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedScenes:
    """The training set in memory; the text is float16 because it is 15 KB a scene."""

    latents: Tensor
    hidden: Tensor
    pooled: Tensor

    def shuffled(self, generator: torch.Generator, batch: int) -> Iterator[Tensor]:
        """Endless batches of row numbers; every pass in an order of its own."""
        while True:
            order = torch.randperm(len(self.latents), generator=generator)
            yield from order.split(batch)[: len(order) // batch]


@torch.no_grad()
def load_scenes(text_file: Path, latents_file: Path) -> EncodedScenes:
    from safetensors.torch import load_file

    stored, text = load_file(latents_file), load_file(text_file)
    vocabulary = text.pop("vocabulary").long()
    encoders = TextEncoders(len(vocabulary)).eval()
    encoders.load_state_dict(text)
    labels = stored["attributes"].long()
    captions = [s.caption for s in scenes.from_labels(torch.where(labels == OPEN, -1, labels))]
    hidden, pooled = [], []
    for start in range(0, len(captions), 256):
        states, vector = encoders(*compact_ids(captions[start : start + 256], vocabulary))
        hidden.append(states.half())
        pooled.append(vector)
    return EncodedScenes(
        latents=stored["latents"], hidden=torch.cat(hidden), pooled=torch.cat(pooled)
    )


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


def train(
    unet: nn.Module, data: EncodedScenes, generator: torch.Generator, *,
    steps: int, until: int, batch: int, peak_rate: float, high_noise: float, out: Path | None,
) -> WeightAverage:  # fmt: skip
    """Cosine-annealed AdamW; returns the averaged weights. With `out`: prints, saves as it goes.

    t = 1000 (1 - u^high_noise), u uniform in [0, 1]: 1 is uniform, 2 twice as dense near 999.
    """
    schedule = VPSchedule.sdxl()
    parameters = list(unet.parameters())
    average = WeightAverage(parameters, decay=0.998)
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0)
    size = float(scenes.IMAGE_PX)
    time_ids = torch.tensor([size, size, 0.0, 0.0, size, size]).expand(batch, -1)
    started = time.time()
    for step, rows in zip(range(until), data.shuffled(generator, batch), strict=False):
        annealed = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_rate * min(1, (step + 1) / 100) * annealed
        x0 = data.latents[rows].float()
        u = torch.rand(batch, generator=generator)
        t = (1000 * (1 - u**high_noise)).long().clamp(0, 999)
        eps = torch.randn(x0.shape, generator=generator)
        keep = (torch.rand(batch, generator=generator) >= DROP_CONDITION).float()
        added = {"text_embeds": data.pooled[rows] * keep[:, None], "time_ids": time_ids}
        hidden = data.hidden[rows].float() * keep[:, None, None]
        out_eps = unet(add_noise(schedule, x0, eps, t), t, hidden, added_cond_kwargs=added).sample
        loss = weighted_loss(out_eps - eps, k_sigma(schedule, t).float())
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        if out and step % 100 == 0:
            print(f"{step}: loss {loss:.4f} {time.time() - started:.0f} s", flush=True)
        if out and step % 1000 == 999:
            save(unet, average, out)
    return average


def save(unet: nn.Module, average: WeightAverage, out: Path) -> None:
    from safetensors.torch import save_file

    with average.applied():
        save_file(unet.state_dict(), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("latents", type=Path, nargs="+", help="one file for each process")
    parser.add_argument("--init", type=Path, help="go on from the weights in this file")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--until", type=int, help="stop after so many steps of the schedule")
    parser.add_argument("--high-noise", type=float, default=1.0, help="2: more often near t = 999")
    parser.add_argument("--batch", type=int, default=32, help="per process")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import load_file

    rank = int(os.environ.get("RANK", 0))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)  # the same start on every rank
    unet = architecture.build_unet()
    if args.init:
        unet.load_state_dict(load_file(args.init))
    average = train(
        unet, load_scenes(args.text, args.latents[rank]),
        torch.Generator().manual_seed(args.seed * 1000 + rank + 1),
        steps=args.steps, until=args.until or args.steps, batch=args.batch,
        peak_rate=args.peak_rate, high_noise=args.high_noise,
        out=args.out if rank == 0 else None,
    )  # fmt: skip
    if rank == 0:
        save(unet, average, args.out)


if __name__ == "__main__":
    main()
