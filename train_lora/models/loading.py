"""A model from a file, a diffusers folder or a hub id: the one way in.

Files and folders load without any network; a hub id is downloaded because the user named it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .components import Components
from .edm_teacher import is_edm_file, load_edm_components
from .flow import tell_flow_time
from .folder import load_folder
from .hub import snapshot
from .markers import PredictionChoice, resolve
from .places import REMEDY, check_model_path, is_hub_id
from .single_file import load_single_file
from .text import encoded
from .tokenizer import MAX_TOKENS, NUM_TOKENS, build_tokenizers


def load_components(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    prediction: PredictionChoice = "auto",
) -> Components:
    """The model at `path`, on the CPU: the UNet in `dtype`, VAE and text encoders in float32.

    (SDXL's VAE overflows in float16; captions are encoded once, so precision is cheap there.)
    Both forms use the tokenizer of this package. `prediction`: see `markers.resolve`.
    An EDM network's file is known by its content, and is always float32.
    """
    name = str(path)
    check_model_path(name)
    if not Path(path).exists() and is_hub_id(name):
        found, name = snapshot(name), name.rpartition("/")[2]
    else:
        found = Path(path)
        name = found.resolve().name.removesuffix(".safetensors")
    if not found.is_dir() and is_edm_file(found):
        if prediction != "auto":
            raise ValueError(
                f"{found} is an EDM network, which predicts pictures, not {prediction!r}: set the "
                'prediction to "auto"'
            )
        return load_edm_components(found, name)
    loaded = (load_folder if found.is_dir() else load_single_file)(found, dtype)
    kind_of_prediction, schedule = resolve(Path(path), loaded.statements, prediction)
    if kind_of_prediction == "flow":
        tell_flow_time(loaded.unet)
    _check_text_encoders(found, loaded.text_encoders)
    for network in (loaded.unet, loaded.vae, *loaded.text_encoders):
        network.requires_grad_(False).eval()
    tokenizers = build_tokenizers(len(loaded.text_encoders))
    empty_prompt = None
    if loaded.kind == "sd15":
        empty_prompt, _ = encoded(loaded.kind, loaded.text_encoders, tokenizers, [""])
    return Components(
        unet=loaded.unet,
        vae=loaded.vae,
        text_encoders=loaded.text_encoders,
        tokenizers=tokenizers,
        schedule=schedule,
        prediction=kind_of_prediction,
        kind=loaded.kind,
        base_hash=loaded.base_hash,
        name=name,
        empty_prompt=empty_prompt,
    )


def _check_text_encoders(path: Path, text_encoders: list[Any]) -> None:
    for encoder in text_encoders:
        config = encoder.config
        found = (config.vocab_size, config.max_position_embeddings)
        if found != (NUM_TOKENS, MAX_TOKENS) or config.num_hidden_layers < 2:
            raise ValueError(
                f"{path} has a text encoder with (tokens, length) {found}, not CLIP's "
                f"({NUM_TOKENS}, {MAX_TOKENS}), or with a single layer: {REMEDY}"
            )
