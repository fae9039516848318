"""The model files that the tests give ComfyUI, and the same model in diffusers for comparison."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from graphs import CHECKPOINT, LORA
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2_core import Denoiser, Recipe
from train_lora.demo import architecture, teacher
from train_lora.export import export_lora
from train_lora.models.components import Components
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.models.saving import save_single_file
from train_lora.models.text import Condition, encode_prompts

RANK, ALPHA = 4, 2.0
SIZE_PX = architecture.UNET_CONFIG["sample_size"] * 8
ONE_STEP_LORA, PLAIN_LORA = "one_step.safetensors", "no_recipe.safetensors"
WIDE_LORA, FOREIGN_LORA = "wide.safetensors", "foreign.safetensors"
DAMAGED_LORA, PARTIAL_LORA = "damaged.safetensors", "partial.safetensors"
V_LORA, DIFFUSERS_LORA = "v_prediction.safetensors", "diffusers_names.safetensors"
NUM_UNKNOWN = 2
_HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256, 32)
_BLOCK_WIDTHS = (32, 32, 32, 64, 64, 96)
"""Channels after each of the tiny UNet's input blocks."""
OTHER_STEPS_LORA = "other_steps.safetensors"
CONTROLNET = "control.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """The embedded teacher and a student on it with arbitrary, clearly visible LoRA weights."""

    components: Components
    student: SharedUNet
    num_modules: int

    def denoiser(self) -> Denoiser[Condition]:
        """The student, as dmd2_core samples it."""
        components = self.components
        return Denoiser(self.network, components.schedule, components.prediction)

    @torch.no_grad()
    def network(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self.student.role(STUDENT):
            return self.student(x_t, t, condition)

    def condition(self, captions: list[str]) -> Condition:
        return encode_prompts(self.components, captions, SIZE_PX, SIZE_PX)


def build(models: Path) -> TinyModel:
    """Write the files below ComfyUI's `models` folder, by the trainer's own code.

    The LoRA's float16 file holds exactly the weights compared with, so that nothing but the
    arithmetic differs between ComfyUI and diffusers.
    """
    components = teacher.load_teacher()
    save_single_file(components, models / "checkpoints" / CHECKPOINT)
    unet = copy.deepcopy(components.unet)
    student = SharedUNet(unet, {STUDENT: LoraSpec(rank=RANK, alpha=ALPHA)}, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters_of(STUDENT):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_((0.03 * noise + weight).half())
    loras = models / "loras"
    recipe = Recipe(timesteps=(999, 749, 499, 249), base_model=components.name)
    export_lora(student, STUDENT, loras / LORA, recipe)
    one_step = Recipe(timesteps=(999,), conditioning_timestep=399)
    export_lora(student, STUDENT, loras / ONE_STEP_LORA, one_step)
    other = Recipe(timesteps=(999, 620, 180), strength=(0.8, 0.3))
    export_lora(student, STUDENT, loras / OTHER_STEPS_LORA, other)
    zero_snr = Recipe(timesteps=(999, 499), prediction="v", zero_terminal_snr=True)
    export_lora(student, STUDENT, loras / V_LORA, zero_snr)
    _write_with_diffusers_names(student, loras / DIFFUSERS_LORA)
    _write_variants(loras)
    write_controlnet(models / "checkpoints" / CHECKPOINT, models / "controlnet" / CONTROLNET)
    modules = len(student.modules_with_adapter)
    return TinyModel(components=components, student=student, num_modules=modules)


def _write_with_diffusers_names(student: SharedUNet, path: Path) -> None:
    """The same weights in the published DMD2 LoRA's form: no recipe, diffusers' module names."""
    tensors = {}
    for name, weight in student.role_state_dict(STUDENT).items():
        module, kind = name.removesuffix(".weight").rsplit(".", 1)
        flat = "lora_unet_" + module.replace(".", "_")
        end = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
        tensors[f"{flat}.{end}.weight"] = weight.half().contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)


def _write_variants(loras: Path) -> None:
    """LoRA files with something missing, too much, or wrong."""
    good = load_file(loras / LORA)
    save_file(good, loras / PLAIN_LORA)
    save_file(good, loras / DAMAGED_LORA, {"dmd2.recipe": "{", "dmd2.recipe_version": "1"})
    unknown = [f"lora_unet_input_blocks_9{i}_0_in_layers_2" for i in range(NUM_UNKNOWN)]
    ends = {".lora_down.weight": (4, 8), ".lora_up.weight": (8, 4), ".alpha": ()}
    extra = {name + end: torch.ones(shape) for name in unknown for end, shape in ends.items()}
    save_file(good | extra, loras / PARTIAL_LORA)
    name = next(key for key in good if key.endswith("attn2_to_k.lora_down.weight"))
    wide = torch.cat([good[name], good[name]], dim=1)  # as of a model with twice the context
    save_file(good | {name: wide}, loras / WIDE_LORA)
    names = ("double_blocks_0_img_attn_qkv", "single_blocks_3_linear1")
    foreign = {
        f"lora_unet_{name}{end}": torch.zeros(shape)
        for name in names
        for end, shape in ends.items()
    }
    save_file(foreign, loras / FOREIGN_LORA)


def write_controlnet(checkpoint: Path, path: Path) -> None:
    """A ControlNet in its original form: the UNet's first half, arbitrary hint and output layers.

    The hint network has the widths of every ControlNet for an image of 8 times the latent's size.
    """
    prefix = "model.diffusion_model."
    unet = {
        key.removeprefix(prefix): weight
        for key, weight in load_file(checkpoint).items()
        if key.startswith(prefix)
    }
    kept = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    tensors = {key: weight for key, weight in unet.items() if key.startswith(kept)}
    generator = torch.Generator().manual_seed(3)
    layers = {
        f"input_hint_block.{2 * index}": (after, before, 3)
        for index, (before, after) in enumerate(itertools.pairwise(_HINT_WIDTHS))
    }
    layers |= {
        f"zero_convs.{index}.0": (width, width, 1) for index, width in enumerate(_BLOCK_WIDTHS)
    }
    layers["middle_block_out.0"] = (_BLOCK_WIDTHS[-1], _BLOCK_WIDTHS[-1], 1)
    for name, (after, before, side) in layers.items():
        shape = (after, before, side, side)
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) / (before * side**2)
        tensors[f"{name}.bias"] = torch.zeros(after)
    save_file(tensors, path)
