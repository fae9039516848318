"""Prepared data, for tests of the data path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train_lora import prepare
from train_lora.config import Config
from train_lora.data.training_data import TrainingData

WIDE, SQUARE = "160x96", "128x128"
PICTURES = [(128, 128), (320, 192), (200, 200), (160, 96), (300, 300), (330, 200)]
"""Three squares and three of about 5:3: the pictures of the fixture `photos`."""


def report_of(config: Config, **options: Any) -> dict[str, Any]:
    return json.loads(prepare.prepare(config, **options).read_text("utf-8"))


def all_batches(data: TrainingData, steps: int = 8) -> list[Any]:
    per_step = data.samples_per_step
    return [data.batch(first=s * per_step, size=per_step, seed=1) for s in range(steps)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
