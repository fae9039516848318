"""safetensors files: the same tensors give the same bytes, and a bad file gives one clear sentence.

The library's own writer orders metadata at random, so equal files would differ; the format itself
is a JSON header with offsets, then the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU, mapped from the file) and the metadata."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    if path.is_dir() or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(
            f"{path} is not a .safetensors file, the only format read here: convert it first"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged, incomplete or not a safetensors file ({error}): "
            "download or export it again"
        ) from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the file whole or not at all; equal content gives equal bytes. Replaces `path`."""
    path = Path(path)
    # Widest type first keeps every tensor aligned, as the library does.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(tensor_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw values in row-major order."""
    values = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(values.view(torch.uint8).numpy())
