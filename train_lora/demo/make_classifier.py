"""Train the metrics' classifier: `python -m train_lora.demo.make_classifier OUT.safetensors`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import scenes
from .classifier import SceneClassifier


def draw_labelled(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes with every attribute known: images (N, 3, 128, 128), labels (N, 6)."""
    filled = scenes.fill_open_attributes(scenes.random_scenes(count, generator), generator)
    return scenes.draw(filled, generator), scenes.labels(filled)


def train(steps: int, batch: int, seed: int) -> SceneClassifier:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SceneClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        images, labels = draw_labelled(batch, generator)
        # Slight noise, so that the features do not hang on a renderer's exact pixel values.
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        logits = model(images)
        loss = sum(
            torch.nn.functional.cross_entropy(values, labels[:, i])
            for i, values in enumerate(logits.values())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (torch.stack([v.argmax(1) for v in logits.values()], 1) == labels).float()
            print(f"step {step}: loss {loss:.3f} accuracy {right.mean(0).tolist()}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import save_file

    model = train(args.steps, args.batch, args.seed)
    with torch.no_grad():
        images, labels = draw_labelled(2000, torch.Generator().manual_seed(args.seed + 1))
        seen = torch.stack([v.argmax(1) for v in model(images).values()], 1)
    right = (seen == labels).float()
    print("held-out accuracy", dict(zip(scenes.ATTRIBUTES, right.mean(0).tolist(), strict=True)))
    print("all attributes", right.prod(1).mean().item())
    save_file({name: value.half() for name, value in model.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
