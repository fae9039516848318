"""How much memory a process takes."""

from __future__ import annotations

import torch

GIB = 2**30


def memory_in_use(device: torch.device) -> tuple[str, int]:
    """A figure's name and bytes: on CUDA the most that tensors have taken so far, as the
    allocator counts; elsewhere what the process has in RAM now."""
    if device.type == "cuda":
        return "memory/cuda_peak_gib", torch.cuda.max_memory_allocated(device)
    import psutil

    return "memory/resident_gib", int(psutil.Process().memory_info().rss)
