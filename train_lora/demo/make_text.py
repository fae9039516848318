"""Train the embedded teacher's text encoders to say what a caption means.

    python -m train_lora.demo.make_text OUT.safetensors

Linear heads read every attribute (and whether the caption leaves it open) off the pooled vector of
encoder G and off the penultimate states of both encoders. A UNet that learns together with
untrained encoders is deaf to captions for most of its training; these encoders are then frozen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.text import token_ids
from ..models.tokenizer import build_tokenizers
from . import architecture, scenes
from .teacher import caption_vocabulary


class TextEncoders(nn.Module):
    """Both encoders as SDXL reads them, over the compact ids of `caption_vocabulary`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder_l, self.encoder_g = architecture.build_text_encoders(vocabulary)

    def forward(self, ids_l: Tensor, ids_g: Tensor) -> tuple[Tensor, Tensor]:
        """ids: (B, 77) int64 -> hidden (B, 77, 96) and pooled (B, 64), both float32."""
        first = self.encoder_l(ids_l, output_hidden_states=True)
        second = self.encoder_g(ids_g, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return hidden, second.text_embeds


def compact_ids(captions: list[str], vocabulary: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the compact token tables for both encoders, each (B, 77)."""
    ids_l, ids_g = token_ids(build_tokenizers(), captions)
    return torch.searchsorted(vocabulary, ids_l), torch.searchsorted(vocabulary, ids_g)


class Readers(nn.Module):
    """One linear head per attribute: its values in label order, then "left open"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Linear(width, len(values) + 1) for values in scenes.ATTRIBUTES.values()
        )

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and the share of attributes read right."""
        targets = [
            torch.where(column < 0, head.out_features - 1, column)
            for head, column in zip(self.heads, labels.T, strict=True)
        ]
        logits = [head(features) for head in self.heads]
        losses = [
            nn.functional.cross_entropy(guess, target)
            for guess, target in zip(logits, targets, strict=True)
        ]
        right = [
            (guess.argmax(1) == target).float().mean()
            for guess, target in zip(logits, targets, strict=True)
        ]
        return torch.stack(losses).mean(), torch.stack(right).mean()


@torch.no_grad()
def normalise_pooled(model: TextEncoders, pooled: Tensor) -> None:
    """Scale the projection so that the pooled numbers vary by 1 from caption to caption."""
    model.encoder_g.text_projection.weight /= pooled.std(0).mean()


def train(vocabulary: Tensor, *, steps: int, batch: int, seed: int) -> TextEncoders:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = TextEncoders(len(vocabulary))
    width = architecture.WIDTH_L + architecture.WIDTH_G
    readers = nn.ModuleList([Readers(architecture.WIDTH_G), Readers(width), Readers(width)])
    parameters = [*model.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        chosen = scenes.random_scenes(batch, generator)
        labels = scenes.labels(chosen)
        hidden, pooled = model(*compact_ids([scene.caption for scene in chosen], vocabulary))
        # Cross attention sees every position; the last ones and the mean know the whole caption.
        views = (pooled, hidden[:, -1], hidden.mean(1))
        results = [reader(view, labels) for reader, view in zip(readers, views, strict=True)]
        loss = torch.stack([loss for loss, _ in results]).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            shares = [round(float(right), 3) for _, right in results]
            print(f"{step}: loss {loss:.4f} read right {shares}", flush=True)
    normalise_pooled(model, pooled)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from safetensors.torch import save_file

    vocabulary = caption_vocabulary()
    model = train(vocabulary, steps=args.steps, batch=args.batch, seed=args.seed)
    save_file(model.state_dict() | {"vocabulary": vocabulary.int()}, args.out)


if __name__ == "__main__":
    main()
