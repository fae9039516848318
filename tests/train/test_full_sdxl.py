"""SDXL at its full size with random weights: `make test-full`, off by default.

2.57 billion parameters in the UNet: a single file of the real names and shapes (7 GB, float16) is
written, loads through the loader, and the 788-module LoRA is exported and applied completely.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmd2_core import Recipe, VPSchedule
from train_lora.export import export_lora, load_lora_into, read_lora
from train_lora.lora_files import ENDS, module_name
from train_lora.models import sdxl_config
from train_lora.models.components import Components
from train_lora.models.convert import components_to_file
from train_lora.models.loading import load_components
from train_lora.models.names import kohya_name
from train_lora.models.roles import CRITIC, STUDENT, LoraSpec, SharedUNet
from train_lora.models.text import Condition, size_ids

pytestmark = pytest.mark.full

LIMIT_GIB = 20
RANK = 4


def peak_gib() -> float:
    """Largest resident memory of this process so far (KiB on Linux, bytes on macOS)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def sdxl_shapes() -> dict[str, torch.Size]:
    with init_empty_weights():
        components = Components(
            unet=UNet2DConditionModel(**sdxl_config.UNET),
            vae=AutoencoderKL(**sdxl_config.VAE),
            text_encoders=[
                CLIPTextModel(CLIPTextConfig(**sdxl_config.CLIP_L)),
                CLIPTextModelWithProjection(CLIPTextConfig(**sdxl_config.CLIP_G)),
            ],
            tokenizers=[],
            schedule=VPSchedule.sdxl(),
            prediction="epsilon",
            base_hash="",
            name="",
        )
    return {name: tensor.shape for name, tensor in components_to_file(components).items()}


def write_random_file(path: Path, shapes: dict[str, torch.Size]) -> None:
    """Tensor after tensor, never more than one in memory: norms near 1, all else small."""
    header: dict[str, object] = {"__metadata__": {"modelspec.prediction_type": "v"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    for mark in ("v_pred", "ztsnr"):
        header[mark] = {"dtype": "F16", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            count = shape.numel()
            fan_in = count // shape[0] if len(shape) > 1 else 1
            scale, mean = (fan_in**-0.5, 0.0) if len(shape) > 1 else (0.01, 1.0)
            values = (block.roll(7919 * number) * scale + mean).half()
            whole, rest = divmod(count, len(values))
            data = values.numpy()
            for _ in range(whole):
                file.write(data.data)
            file.write(data[:rest].data)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "sdxl.safetensors"
    write_random_file(path, sdxl_shapes())
    yield path
    path.unlink()


def test_full_size_sdxl_loads_and_its_lora_applies_completely(file: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    components = load_components(file, dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    loaded_gib = peak_gib()
    assert components.unet.num_parameters() == 2_567_463_684
    assert components.prediction == "v"
    assert components.schedule.has_zero_terminal_snr
    assert components.unet.dtype == torch.bfloat16

    specs = {role: LoraSpec(rank=RANK, alpha=2.0) for role in (STUDENT, CRITIC)}
    unet = SharedUNet(components.unet, specs, seed=0)
    assert len(unet.modules_with_adapter) == 788
    generator = torch.Generator().manual_seed(1)
    for weight in unet.parameters_of(STUDENT):
        weight.data.normal_(std=0.02, generator=generator)
    path = tmp_path / "lora.safetensors"
    recipe = Recipe(timesteps=(999, 749, 499, 249), prediction="v", zero_terminal_snr=True)
    export_lora(unet, STUDENT, path, recipe, dtype=torch.float32)
    modules, _ = read_lora(path)
    assert len(modules) == 788

    load_lora_into(unet, path, role=CRITIC)  # ours: every module, bit for bit
    assert all(map(torch.equal, unet.parameters_of(CRITIC), unet.parameters_of(STUDENT)))
    state, alphas, *_ = StableDiffusionXLPipeline.lora_state_dict(
        str(path), unet_config=components.unet.config
    )  # diffusers': every module is one of this UNet
    ends = [ENDS.fullmatch(name) for name in state]
    assert {module_name(end) for end in ends} == set(map(kohya_name, unet.modules_with_adapter))
    assert len(alphas) == 788

    x_t = torch.randn(1, 4, 8, 8, generator=generator)
    condition = Condition(
        hidden=torch.randn(1, 77, 2048, generator=generator),
        pooled=torch.randn(1, 1280, generator=generator),
        time_ids=size_ids(1, 64, 64),
    )
    outputs = []
    with torch.no_grad():
        for role in (STUDENT, CRITIC, "teacher"):
            with unet.role(role):
                outputs.append(unet(x_t, torch.tensor([749]), condition))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert all(output.isfinite().all() for output in outputs)
    print(
        f"\nfull SDXL: loaded in {seconds:.0f} s, peak {loaded_gib:.1f} GiB after loading, "
        f"{peak_gib():.1f} GiB in all"
    )
    assert peak_gib() < LIMIT_GIB
