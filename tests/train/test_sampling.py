"""Pictures from a role of the UNet: how many at once, and where there is no room for them."""

from __future__ import annotations

import logging

import pytest
import torch

from dmd2_core import StepPlan
from train_lora import sampling
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.sampling import decode_latents, rows_at_once, sample_latents, vae_rows

from .tiny import random_condition


def test_large_pictures_pass_one_at_a_time() -> None:
    assert [rows_at_once(side, side) for side in (2048, 1024, 512, 128)] == [1, 1, 4, 64]
    assert rows_at_once(832, 1216) == 1
    assert [vae_rows(side, side) for side in (1024, 512, 128)] == [1, 4, 16]


def test_drawn_in_turn_they_are_the_same(components, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise belongs to a picture's place, not to its batch; kernels differ in the last bits."""
    unet = SharedUNet(components.unet, {STUDENT: LoraSpec(rank=2, alpha=1.0)}, seed=0)
    condition = random_condition(5, torch.Generator().manual_seed(1))

    def draw() -> torch.Tensor:
        return sample_latents(
            unet, STUDENT, components, condition, StepPlan.evenly(2), seed=3, guidance=2.0
        )

    whole = draw()
    monkeypatch.setattr(sampling, "PASS_PX", 2 * 128 * 128)
    assert torch.allclose(draw(), whole, atol=1e-4)
    assert not torch.allclose(whole[0], whole[2], atol=1e-1)


def test_without_room_on_the_gpu_the_cpu_decodes(
    components, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first attempt fails as a full GPU does."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    expected, decode, calls = decode_latents(components, latents), components.vae.decode, []

    def full_once(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(components.vae, "decode", full_once)
    with caplog.at_level(logging.INFO, "train_lora"):
        assert torch.equal(decode_latents(components, latents), expected)
    assert len(calls) == 2
    assert "the CPU does it" in caplog.text
