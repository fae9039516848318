"""The benchmark of one iteration, on the embedded teacher, and the bytes that its plan counts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, init_empty_weights

from benchmarks.full_iteration import benchmark_config, main, random_data
from benchmarks.memory_plan import optimizer_bytes, resident_bytes
from benchmarks.random_model import fill
from dmd2_core import derived_generator
from train_lora.config import Config
from train_lora.demo import architecture
from train_lora.optimizer import build_optimizer
from train_lora.trainer import build_trainer

from .tiny import random_components

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SMALL = {"student.rank": "4", "critic.rank": "4", "batch_size": "1"}
ONE = {"gradient_accumulation_steps": "1"}


def config_of(folder: Path, **overrides: str) -> Config:
    options = SMALL | ONE | {key.replace("__", "."): value for key, value in overrides.items()}
    return benchmark_config("sdxl-4step-16gb", list(options.items()), "tiny", folder)


def test_the_command_runs_the_trainer_and_prints_a_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--{key}={value}" for key, value in (SMALL | ONE).items()]
    argv = ["--preset", "sdxl-4step-16gb", "--model", "tiny", "--repeat", "1", *options]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, 128 px, batch 1 x 1, rank 4, adamw, base fp32")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[0] for row in rows] == [
        "after loading",
        "student and critic update",
        "critic update alone",
    ]
    peaks = [float(row[1]) for row in rows]
    assert 0.1 < peaks[0] <= peaks[1] <= peaks[2] < 10  # of the process, in GiB
    assert all(float(row[3]) > 0 for row in rows[1:])


def test_options_without_effect_are_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--preset", "sdxl-4step-16gb", "--model", "tiny", "--steps=2", "--timesteps=999"])
    config = config_of(tmp_path, gan__enabled="false")  # the benchmark's own images give way
    assert not config.needs_real_images


def test_resident_bytes_are_those_of_the_networks(tmp_path: Path) -> None:
    """bf16 base with float32 norms, float32 adapters; 8-bit states a quarter of 8 bytes each."""
    found = resident_bytes(config_of(tmp_path), "tiny")
    trainer = build_trainer(
        config_of(tmp_path, base_precision="bf16"),
        random_components(),
        random_data(config_of(tmp_path), random_components(), torch.device("cpu")),
        Accelerator(cpu=True, mixed_precision="bf16"),
    )
    unet = trainer.distiller.unet
    adapters = [p for role in unet.adapters for p in unet.parameters_of(role)]
    of_adapters = sum(4 * p.numel() for p in adapters)
    everything = sum(p.numel() * p.element_size() for p in unet.unet.parameters())
    head = sum(4 * p.numel() for p in trainer.distiller.head.parameters())
    assert found == {
        "frozen base": everything - of_adapters,
        "LoRA adapters": of_adapters,
        "discriminator head": head,
        "student's average": of_adapters // 2,
        "student's optimizer": of_adapters,
        "critic's optimizer": of_adapters,
        "head's optimizer": 2 * head,
    }


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizer_bytes_are_those_of_a_real_one(name: str) -> None:
    weights = [torch.nn.Parameter(torch.ones(size)) for size in (3, 4095, 4096, 70_000)]
    optimizer = build_optimizer(name, [(weights, 1e-3)], betas=(0.9, 0.999), weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        for key, value in state.items():  # bitsandbytes' tables of 256 levels are shared by all
            if isinstance(value, torch.Tensor) and key != "step" and "qmap" not in key:
                held += value.numel() * value.element_size()
    assert optimizer_bytes(weights, name) == held


def test_random_weights_give_finite_outputs() -> None:
    with init_empty_weights():
        unet = architecture.build_unet()
    fill(unet, torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in unet.parameters())
    generator = derived_generator(0)
    inputs = {
        "encoder_hidden_states": torch.randn(1, 77, 96, generator=generator).bfloat16(),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 64, generator=generator).bfloat16(),
            "time_ids": torch.zeros(1, 6),
        },
    }
    x_t = torch.randn(1, 4, 16, 16, generator=generator).bfloat16()
    with torch.no_grad():
        output = unet(x_t, torch.tensor([500]), **inputs).sample
    assert output.isfinite().all()
    assert 0.01 < output.float().std() < 100
