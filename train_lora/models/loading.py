"""A model from a diffusers folder or one SDXL-format .safetensors file, without any network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmd2_core import Prediction, VPSchedule

from . import convert
from .components import Components
from .fingerprint import weights_hash
from .infer import infer_configs
from .names import CLIP_G_PREFIX, CLIP_L_PREFIX, UNET_PREFIX, VAE_PREFIX
from .safetensors_io import read_safetensors
from .tokenizer import MAX_TOKENS, NUM_TOKENS, build_tokenizers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    Networks = tuple[
        UNet2DConditionModel, AutoencoderKL, list[CLIPTextModel | CLIPTextModelWithProjection]
    ]

REMEDY = "give an SDXL base checkpoint (.safetensors) or a diffusers folder of one"
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}


def load_components(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Components:
    """The model at `path`, on the CPU: UNet and text encoders in `dtype`, the VAE in float32.

    (SDXL's VAE overflows in float16.) Both forms use the tokenizer of this package.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: {REMEDY}")
    load = _load_folder if path.is_dir() else _load_file
    (unet, vae, text_encoders), schedule, prediction, base_hash = load(path, dtype)
    _check_text_encoders(path, text_encoders)
    networks: list[nn.Module] = [unet, vae, *text_encoders]
    for network in networks:
        network.requires_grad_(False).eval()
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=build_tokenizers(),
        schedule=schedule,
        prediction=prediction,
        base_hash=base_hash,
        name=path.resolve().name.removesuffix(".safetensors"),
    )


# One file


def _load_file(path: Path, dtype: torch.dtype) -> tuple[Networks, VPSchedule, Prediction, str]:
    file, metadata = read_safetensors(path)
    _check_architecture(path, file)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    try:
        networks = _build(file, infer_configs(shapes, _resolution_px(metadata)), dtype)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else _first_line(error)
        raise ValueError(f"{path} does not have SDXL's structure ({reason}): {REMEDY}") from error
    schedule = VPSchedule.sdxl()
    prediction: Prediction = "v" if "v_pred" in file else "epsilon"
    if "v_pred" in file and "ztsnr" in file:  # ComfyUI's marks, of v-prediction fine-tunes
        schedule = schedule.zero_terminal_snr()
    weights = {
        name.removeprefix(UNET_PREFIX): tensor
        for name, tensor in file.items()
        if name.startswith(UNET_PREFIX)
    }
    return networks, schedule, prediction, weights_hash(weights)


def _check_architecture(path: Path, file: Mapping[str, Tensor]) -> None:
    """Name what the file is, where it is something well known that is not SDXL."""

    def has(beginning: str) -> bool:
        return any(name.startswith(beginning) for name in file)

    parts = (UNET_PREFIX, VAE_PREFIX, CLIP_L_PREFIX, CLIP_G_PREFIX)
    missing = [part for part in parts if not has(part)]
    if any("lora_down." in name or "lora_A." in name for name in file):
        what = "is a LoRA, not a checkpoint"
    elif has("cond_stage_model."):
        what = "is a Stable Diffusion 1.x or 2.x checkpoint, not SDXL"
    elif has("conditioner.embedders.0.model."):
        what = "is an SDXL refiner, not an SDXL base model"
    elif "edm_mean" in file or "edm_vpred.sigma_max" in file:
        what = "was trained on an EDM schedule, which is not SDXL's"
    elif missing:
        what = f"is not a complete SDXL checkpoint: it has no tensors {missing[0]}*"
    elif file[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1] != 4:
        channels = file[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1]
        what = f"is an inpainting or editing model with {channels} input channels, not 4"
    else:
        return
    raise ValueError(f"{path} {what}: {REMEDY}")


def _resolution_px(metadata: Mapping[str, str]) -> int:
    """The side length in `modelspec.resolution` ("1024x1024"); SDXL's if it is absent or odd."""
    side = metadata.get("modelspec.resolution", "").split("x")[0]
    return int(side) if side.isdecimal() and 8 <= int(side) <= 8192 else 1024


def _build(
    file: dict[str, Tensor], configs: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> Networks:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet, vae = configs["unet"], configs["vae"]
    clip_l, clip_g = CLIPTextConfig(**configs["clip_l"]), CLIPTextConfig(**configs["clip_g"])
    return (
        _filled(
            lambda: UNet2DConditionModel(**unet),
            lambda keys: convert.unet_from_file(file, keys, unet),
            dtype,
        ),
        _filled(
            lambda: AutoencoderKL(**vae),
            lambda keys: convert.vae_from_file(file, keys, vae),
            torch.float32,
        ),
        [
            _filled(
                lambda: CLIPTextModel(clip_l),
                lambda keys: convert.clip_l_from_file(file, keys),
                dtype,
            ),
            _filled(
                lambda: CLIPTextModelWithProjection(clip_g),
                lambda keys: convert.clip_g_from_file(file, keys, clip_g.num_hidden_layers),
                dtype,
            ),
        ],
    )


def _filled(
    build: Callable[[], Any],
    state_for: Callable[[list[str]], dict[str, Tensor]],
    dtype: torch.dtype,
) -> Any:
    """The network `build` makes, holding copies of the tensors (not the mapped file)."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = build()
    state = state_for(list(network.state_dict()))
    state = {
        key: tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in state.items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network


# A folder


def _load_folder(path: Path, dtype: torch.dtype) -> tuple[Networks, VPSchedule, Prediction, str]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    index = _read_json(path / "model_index.json")
    if index.get("_class_name") != "StableDiffusionXLPipeline":
        raise ValueError(
            f"{path} holds a {index.get('_class_name')}, not a StableDiffusionXLPipeline: {REMEDY}"
        )
    schedule, prediction = _read_scheduler(path / "scheduler" / "scheduler_config.json")

    def load(network: Any, part: str, dtype: torch.dtype) -> Any:
        kind = {"torch_dtype" if hasattr(network, "load_config") else "dtype": dtype}
        try:
            return network.from_pretrained(
                path / part,
                local_files_only=True,
                use_safetensors=True,
                variant=_variant(path / part),
                **kind,
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path / part} cannot be loaded ({_first_line(error)}): {REMEDY}"
            ) from error

    networks = (
        load(UNet2DConditionModel, "unet", dtype),
        load(AutoencoderKL, "vae", torch.float32),
        [
            load(CLIPTextModel, "text_encoder", dtype),
            load(CLIPTextModelWithProjection, "text_encoder_2", dtype),
        ],
    )
    return networks, schedule, prediction, _folder_hash(path / "unet", networks[0].config)


def _variant(folder: Path) -> str | None:
    """ "fp16" where a folder holds nothing but such weights, as some downloads do."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _folder_hash(folder: Path, config: Mapping[str, Any]) -> str:
    """From the stored weights, so that it does not depend on the dtype of loading."""
    variant = _variant(folder)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if variant or ".fp16" not in file.name:
            weights |= read_safetensors(file)[0]
    return weights_hash(convert.unet_to_file(weights, config))


def _read_scheduler(path: Path) -> tuple[VPSchedule, Prediction]:
    config = _read_json(path)
    expected = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise ValueError(f"{path} has {key} {config.get(key)!r}, SDXL's is {value!r}: {REMEDY}")
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise ValueError(
            f"{path} has prediction_type {kind!r}: use one of {', '.join(_PREDICTIONS)}"
        )
    schedule = VPSchedule.sdxl()
    if config.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()
    return schedule, _PREDICTIONS[kind]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: {REMEDY}")
    return content


def _check_text_encoders(path: Path, text_encoders: list[Any]) -> None:
    for encoder in text_encoders:
        config = encoder.config
        found = (config.vocab_size, config.max_position_embeddings)
        if found != (NUM_TOKENS, MAX_TOKENS) or config.num_hidden_layers < 2:
            raise ValueError(
                f"{path} has a text encoder with (tokens, length) {found}, not CLIP's "
                f"({NUM_TOKENS}, {MAX_TOKENS}), or with a single layer: {REMEDY}"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
