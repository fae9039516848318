"""Train the embedded teacher's UNet and text encoders on latents of drawn scenes.

    torchrun --nproc_per_node 2 -m train_lora.demo.make_unet VAE.safetensors OUT.safetensors

Epsilon prediction on SDXL's schedule, min-SNR-5 weighting, 10% of the conditions zeroed (SDXL's
unconditional branch), exponential moving average of the weights. Only the tokens that captions use
have rows in the token tables. Each process draws its own scenes; gradients are averaged in one flat
reduction. The same seed and number of processes give the same weights on one machine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import average_gradients
from ..models.text import token_ids
from ..models.tokenizer import build_tokenizers
from . import architecture, scenes
from .teacher import caption_vocabulary

DROP_CONDITION = 0.1
WEIGHT_RANGE = (0.5, 8.0)


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


def train(
    vae: nn.Module,
    *,
    steps: int,
    batch: int,
    num_scenes: int,
    seed: int,
    rank: int,
    save: Path,
    init: Path | None,
    peak: float,
) -> None:
    torch.manual_seed(seed)  # the same start on every rank
    vocabulary = caption_vocabulary()
    model = Teacher(len(vocabulary))
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed * 1000 + rank + 1)
    started = time.time()
    if init is not None:
        from safetensors.torch import load_file

        model.load_state_dict(
            {k: v for k, v in load_file(init).items() if k != "vocabulary"}, strict=False
        )
        average = [p.detach().clone() for p in parameters]
    latents, ids_l, ids_g = draw_latents(vae, num_scenes, generator)
    ids_l, ids_g = torch.searchsorted(vocabulary, ids_l), torch.searchsorted(vocabulary, ids_g)
    print(
        f"rank {rank}: {num_scenes} latents, deviation {latents.std():.3f}, "
        f"{time.time() - started:.0f} s",
        flush=True,
    )
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
    alpha, sigma = abar.sqrt().float(), (1 - abar).sqrt().float()
    weight = (sigma / alpha).clamp(*WEIGHT_RANGE)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    order = torch.randperm(num_scenes, generator=generator)
    smooth = None
    started = time.time()
    for step in range(steps):
        warmup = min(1, (step + 1) / 100)
        rate = peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        place = (step * batch) % (num_scenes - batch + 1)
        if place < batch:
            order = torch.randperm(num_scenes, generator=generator)
        pick = order[place : place + batch]
        x0 = latents[pick]
        t = (1000 * (1 - torch.rand(batch, generator=generator) ** 2)).long().clamp(0, 999)
        eps = torch.randn(x0.shape, generator=generator)
        x_t = alpha[t, None, None, None] * x0 + sigma[t, None, None, None] * eps
        keep = (torch.rand(batch, generator=generator) >= DROP_CONDITION).float()
        out = model(x_t, t, ids_l[pick], ids_g[pick], keep)
        loss = (weight[t] * (out - eps).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if rank == 0 and (step % 100 == 0 or step == steps - 1):
            print(f"step {step}: loss {smooth:.4f} {time.time() - started:.0f} s", flush=True)
        if rank == 0 and (step % 500 == 499 or step == steps - 1):
            write(model, vocabulary, parameters, average, save)


def write(
    model: nn.Module, vocabulary: Tensor, parameters: list, average: list, path: Path
) -> None:
    """Save the averaged weights, and which CLIP token each row of the token tables stands for."""
    from safetensors.torch import save_file

    averaged = {id(p): value for p, value in zip(parameters, average, strict=True)}
    state = {
        name: averaged[id(p)].clone() for name, p in model.named_parameters() if id(p) in averaged
    }
    save_file(state | {"vocabulary": vocabulary.int()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="per process")
    parser.add_argument("--scenes", type=int, default=12000, help="per process")
    parser.add_argument("--init", type=Path, help="go on from the weights in this file")
    parser.add_argument("--peak-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import load_file

    rank = int(os.environ.get("RANK", 0))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    vae = architecture.build_vae()
    vae.load_state_dict(load_file(args.vae))
    train(
        vae.eval(),
        steps=args.steps,
        batch=args.batch,
        num_scenes=args.scenes,
        seed=args.seed,
        rank=rank,
        save=args.out,
        init=args.init,
        peak=args.peak_rate,
    )


if __name__ == "__main__":
    main()
