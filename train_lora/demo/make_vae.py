"""Train the embedded teacher's 8x VAE on drawn scenes.

    torchrun --nproc_per_node 2 -m train_lora.demo.make_vae OUT.safetensors

Reconstruction in L1, of the picture and of its edges (small shapes blur otherwise), with a light KL
term, in bfloat16, first on 64 px crops (quick), then on whole pictures (GroupNorm's statistics
differ between the two). After each phase every latent channel is shifted
and scaled to mean 0 and deviation 1 / 0.13025 by folding the affine map into `quant_conv` and
`post_quant_conv`, because everyone multiplies SDXL latents by that constant.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import average_gradients
from . import architecture, scenes

CROP_PX = 64
POOL = 4096
EDGE_WEIGHT = 0.5


def draw_pool(count: int, generator: torch.Generator) -> Tensor:
    """`count` random scenes as (N, 3, 128, 128) uint8."""
    chunks = []
    for start in range(0, count, 256):
        chunk = scenes.random_scenes(min(256, count - start), generator)
        chunks.append(((scenes.draw(chunk, generator) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(chunks)


def random_crops(pool: Tensor, batch: int, size_px: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(pool), (batch,), generator=generator)
    top, left = torch.randint(scenes.IMAGE_PX - size_px + 1, (2,), generator=generator).tolist()
    crop = pool[index, :, top : top + size_px, left : left + size_px]
    return crop.float() / 127.5 - 1


def picture_distance(out: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, and that of the differences between neighbouring pixels."""
    error = out - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


@torch.no_grad()
def whiten_latents(vae: nn.Module, images: Tensor) -> None:
    """Fold in the per-channel affine map that gives latents mean 0, deviation 1 / LATENT_SCALE."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (architecture.LATENT_SCALE * std)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()  # log variance
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= gain[None, :, None, None]


def train_phase(
    vae: nn.Module,
    parameters: list[nn.Parameter],
    pool: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    batch: int,
    size_px: int,
    latent_scale: float,
    peak_rate: float,
    kl_weight: float = 3e-4,
) -> None:
    """One phase; `latent_scale` brings the latents near unit deviation for the KL term."""
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    started = time.time()
    for step in range(steps):
        x = random_crops(pool, batch, size_px, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            out = vae.decode(posterior.mean + posterior.std * noise).sample
        reconstruction = picture_distance(out.float(), x)
        mean = posterior.mean.float() * latent_scale
        std = posterior.std.float() * latent_scale
        kl = (0.5 * (mean**2 + std**2 - 1) - std.log()).mean()
        optimizer.zero_grad()
        (reconstruction + kl_weight * kl).backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.time() - started
            print(f"{step}: distance {reconstruction:.4f} KL {kl:.2f} {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init", type=Path, help="start from this file instead of the crop phase")
    parser.add_argument("--crop-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=650, help="on whole pictures")
    parser.add_argument("--batch", type=int, default=8, help="per process")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import load_file, save_file

    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank + 1)
    vae = architecture.build_vae()
    pool = draw_pool(POOL, generator)
    whitening = draw_pool(256, torch.Generator().manual_seed(args.seed)).float() / 127.5 - 1
    if args.init:
        vae.load_state_dict(load_file(args.init))
    else:
        train_phase(
            vae,
            list(vae.parameters()),
            pool,
            generator,
            steps=args.crop_steps,
            batch=args.batch,
            size_px=CROP_PX,
            latent_scale=1.0,
            peak_rate=2e-3,
        )
        whiten_latents(vae, whitening)
    parts = [vae.post_quant_conv, vae.decoder] if args.decoder_only else [vae]
    vae.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    train_phase(
        vae,
        parameters,
        pool,
        generator,
        steps=args.steps,
        batch=args.batch,
        size_px=scenes.IMAGE_PX,
        latent_scale=architecture.LATENT_SCALE,
        peak_rate=1e-3,
    )
    if not args.decoder_only:
        whiten_latents(vae, whitening)
    if rank == 0:
        save_file(vae.state_dict(), args.out)


if __name__ == "__main__":
    main()
