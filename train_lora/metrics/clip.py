"""CLIP score: how well pictures fit their captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.rows import HUB

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "A photo depicts "
"""What every caption begins with. Source: Hessel et al., arXiv 2104.08718, section 3."""
PAPERS = "hub:laion/CLIP-ViT-g-14-laion2B-s12B-b42K"


class ClipScorer:
    """One CLIP model with its own preprocessing."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """Cosine of each picture and its caption: (B,) float32 on the CPU.

        As a share of 1, as the DMD2 paper gives it; torchmetrics gives it times 100.
        """
        inputs = self.processor(
            text=[PREFIX + caption for caption in captions],
            images=list(pictures),
            return_tensors="pt",
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
        )
        found = self.model(**inputs.to(self.model.device))
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).float().cpu()


def load_clip(choice: str, device: torch.device) -> ClipScorer:
    """A folder that transformers can read (config, safetensors, processor), or hub:OWNER/NAME.

    Only hub:OWNER/NAME uses the network, and says so.
    """
    local = not choice.startswith(HUB)
    if local and not (Path(choice) / "config.json").is_file():
        raise ValueError(
            f"--clip is {choice!r}, which is no folder with a config.json. Nothing is downloaded "
            f"unasked: name the folder of a CLIP model, or {PAPERS} (the paper's)."
        )
    from transformers import CLIPModel, CLIPProcessor

    name = choice.removeprefix(HUB)
    if not local:
        print(f"Taking {name} from the Hugging Face cache or huggingface.co ...", file=sys.stderr)
    try:
        model = CLIPModel.from_pretrained(name, local_files_only=local, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--clip {choice!r} cannot be read as a CLIP model ({reason}); name a folder with its "
            "config, .safetensors weights, tokenizer and preprocessor_config.json."
        ) from error
    return ClipScorer(model.eval().requires_grad_(False).to(device), processor)
