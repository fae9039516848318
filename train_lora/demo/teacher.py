"""The embedded teacher: SDXL in small, trained on drawn scenes, its weights in this package.

`weights/teacher.safetensors` holds UNet, VAE and text encoders in float16. Of the token tables it
holds only the rows that captions use; the other 49,369 are zeros, so words that scenes do not know
say nothing. `make teacher` made it; `weights/README.md` has the figures that it reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import architecture, scenes

if TYPE_CHECKING:
    from ..models.components import Components

NAME = "dmd2-demo-teacher"
WEIGHTS_FILE = Path(__file__).parent / "weights" / "teacher.safetensors"
TOKEN_TABLE = "token_embedding.weight"


def caption_vocabulary() -> Tensor:
    """Ids of the CLIP tokens that captions use, with padding, start and end: (K,) int64, sorted."""
    from ..models.text import token_ids
    from ..models.tokenizer import build_tokenizers

    words = sorted({word for values in scenes.ATTRIBUTES.values() for word in values})
    sentence = " ".join(["a an on background ,", *words])
    return torch.unique(torch.cat(token_ids(build_tokenizers(), [sentence])))


def load_teacher(weights: Path = WEIGHTS_FILE) -> Components:
    """The teacher's networks in float32, frozen, in evaluation mode, on the CPU."""
    from safetensors.torch import load_file

    from dmd2_core import VPSchedule

    from ..models.components import Components
    from ..models.fingerprint import unet_hash
    from ..models.tokenizer import build_tokenizers

    stored = {name: value.float() for name, value in load_file(weights).items()}
    vocabulary = stored.pop("vocabulary").long()
    encoder_l, encoder_g = architecture.build_text_encoders()
    parts = {
        "unet": architecture.build_unet(),
        "vae": architecture.build_vae(),
        "encoder_l": encoder_l,
        "encoder_g": encoder_g,
    }
    for prefix, network in parts.items():
        state = {
            name.removeprefix(f"{prefix}."): value
            for name, value in stored.items()
            if name.startswith(f"{prefix}.")
        }
        for name in [name for name in state if name.endswith(TOKEN_TABLE)]:
            table = torch.zeros(architecture.CLIP_TOKENS, state[name].shape[1])
            table[vocabulary] = state[name]
            state[name] = table
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
    return Components(
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoders=[encoder_l, encoder_g],
        tokenizers=build_tokenizers(),
        schedule=VPSchedule.sdxl(),
        prediction="epsilon",
        base_hash=unet_hash(parts["unet"]),
        name=NAME,
    )
