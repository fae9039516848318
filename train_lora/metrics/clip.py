"""CLIP score: how well pictures fit their captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.rows import HUB
from ..models.building import first_line
from ..models.hub import is_of_the_hub

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "A photo depicts "
"""What every caption begins with. Source: Hessel et al., arXiv 2104.08718, section 3."""
WEIGHTS = "model*.safetensors"
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
    folder = Path(choice) if local else _snapshot(choice)
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--clip {choice!r} cannot be read as a CLIP model ({reason}); name a folder with its "
            "config, .safetensors weights, tokenizer and preprocessor_config.json."
        ) from error
    return ClipScorer(model.eval().requires_grad_(False).to(device), processor)


def _snapshot(choice: str) -> Path:
    """The cached folder of hub:OWNER/NAME; what the cache lacks is downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = choice.removeprefix(HUB)
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if all(any(cached.glob(name)) for name in ("*processor_config.json", WEIGHTS)):
            return cached
    except LocalEntryNotFoundError:
        pass
    print(f"Downloading {name} from huggingface.co into the Hugging Face cache", file=sys.stderr)
    try:
        HfApi().model_info(name)  # says at once what a download says after minutes of trying
        return Path(snapshot_download(name, allow_patterns=["*.json", "merges.txt", WEIGHTS]))
    except Exception as error:
        if not is_of_the_hub(error):
            raise
        raise ValueError(
            f"--clip {choice!r} is not in the Hugging Face cache and cannot be had from "
            f"huggingface.co ({type(error).__name__}: {first_line(error)}): check the name and the "
            f"connection, or put its files ({WEIGHTS} and all .json) into a folder and name that"
        ) from error
