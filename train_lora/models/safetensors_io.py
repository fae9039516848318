"""safetensors files: the same tensors give the same bytes, and a bad file gives one clear sentence.

The library's own writer orders metadata at random, so equal files would differ; the format itself
is a JSON header with offsets, then the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..output import writing

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


_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def _is_pickle(path: Path) -> bool:
    """Whether the content is torch's zip archive or a bare pickle, whatever the file's name."""
    with path.open("rb") as file:
        start = file.read(9)  # of a safetensors file: the header's length, then "{"
    bare = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return start.startswith(b"PK\x03\x04") or (bare and start[8:] != b"{")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU, mapped from the file) and the metadata."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a .safetensors file: name a file in it")
    if path.suffix in _PICKLE_SUFFIXES or _is_pickle(path):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not read: "
            "get the .safetensors version of this model, or convert it where you trust the file "
            "(in ComfyUI: Load Checkpoint, then Save Checkpoint)"
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
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write the file whole or not at all; equal content gives equal bytes. Replaces `path`.

    `change(name, tensor)` gives what is written instead, of the same shape and dtype: one at a
    time, so that a mapped file larger than the memory can be rewritten.

    OSError with the path where the system refuses, for one when the disk is full.
    """
    path = Path(path)
    names = _in_file_order(tensors)
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
        with writing(path), partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = tensors[name] if change is None else change(name, tensors[name])
                assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
                file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest type first keeps every tensor aligned, as the library does."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of what follows the header in a file of these tensors, as A1111 and modelspec take."""
    digest = hashlib.sha256()
    for name in _in_file_order(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw values in row-major order."""
    values = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(values.view(torch.uint8).numpy())
