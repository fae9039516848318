"""For every test: no hub, exact arithmetic."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of these libraries
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _exact_arithmetic() -> None:
    """TF32 off, so that tolerances mean on a GPU what they mean on a CPU."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
