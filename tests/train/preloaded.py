"""What the processes of launching.py have imported when they start: all that a training needs."""

from __future__ import annotations

from importlib import import_module

from train_lora.models.precision import import_bitsandbytes

import_bitsandbytes()  # before diffusers does it
for name in (
    "accelerate.tracking",
    "diffusers.models.attention",
    "diffusers.models.unets.unet_2d_condition",
    "peft",
    "tests.train.tiny",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "train_lora.cli",
    "train_lora.demo.teacher",
    "train_lora.export_checkpoint",
    "train_lora.models.loading",
    "train_lora.monitor",
    "train_lora.prepare",
    "tests.train.recipes",
    "train_lora.trainer",
    "transformers.models.clip.modeling_clip",
):
    import_module(name)
