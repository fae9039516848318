"""Published EDM checkpoints (.pkl) to plain tensors, without running anything that is in them.

Such a file is a pickle of modules that carry their own source code, which the usual way of reading
executes. Here the pickle may name only what is on a short list, and each name stands for a record
that does nothing but hold its arguments; the source code stays a string that nobody reads. The
tensors' bytes, pickles of their own, go through torch's loader for weights alone.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BOX = torch.full((1, 1, 2, 2), 0.25)
"""The only resampling filter of ADM: the mean of 2x2 pixels (up: their repetition)."""
_FILTER = "resample_filter"


class _Record:
    """What stands for an object of the pickle: its arguments and its state, nothing else."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Persistent(_Record):
    """EDM's modules: one argument, a dict with the class's name, its source and its state."""


class _Module(_Record):
    """torch's containers."""


class _Storage(_Record):
    """The bytes of a tensor, as torch.save wrote them."""


class _Tensor(_Record):
    """storage, offset, shape, strides, ..."""


class _Parameter(_Record):
    """tensor, requires_grad, hooks."""


class _Attributes(dict[Any, Any]):
    """A dict that also has attributes: dnnlib's; the attributes are its items."""

    def __setstate__(self, state: Any) -> None:
        if state:
            raise _refusal("a dict with a state of its own")


_ALLOWED: dict[tuple[str, str], type] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("torch.nn.modules.container", "ModuleDict"): _Module,
    ("torch.nn.modules.container", "ModuleList"): _Module,
    ("torch.nn.modules.container", "Sequential"): _Module,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("dnnlib.util", "EasyDict"): _Attributes,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    """pickle's machine, in which every name that is not on the list is an error."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise _refusal(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, key: Any) -> Any:
        raise _refusal("a reference to something outside the file")


class _Refused(ValueError):
    pass


def _refusal(what: str) -> _Refused:
    return _Refused(
        f"it holds {what}, which a published EDM checkpoint has no need of, so it is not read: "
        "download edm-imagenet-64x64-cond-adm.pkl from its publisher again"
    )


def read_edm_pickle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged network ("ema"): its tensors by name, float32, and what it was built with.

    Resampling filters are checked to be ADM's and left out: they are constants. ValueError, in one
    sentence, for a file that holds anything but such a network; nothing in it is run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        network = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(network, _Persistent):
            raise _Refused(
                'it holds no network under the name "ema": name a checkpoint such as '
                "edm-imagenet-64x64-cond-adm.pkl"
            )
        tensors = _without_filters(_named_tensors(network))
        settings = _state_of(network).get("_init_kwargs", {})
        return tensors, dict(settings) if isinstance(settings, Mapping) else {}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # whatever else a broken or made-up pickle can lead to
        raise ValueError(
            f"{path} is no EDM checkpoint, or is damaged ({type(error).__name__}: {error}): "
            "download it again"
        ) from error


def _state_of(record: _Record) -> Mapping[str, Any]:
    """A module's attributes; ValueError where there are none."""
    state = record.state
    if isinstance(record, _Persistent):
        state = record.arguments[0]["state"]
    if not isinstance(state, Mapping):
        raise _refusal("a module without attributes")
    return state


def _named_tensors(record: _Record, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a module and of those in it, named as `state_dict` names them."""
    state = _state_of(record)
    named: dict[str, Tensor] = {}
    unsaved = state.get("_non_persistent_buffers_set", ())
    for group in ("_parameters", "_buffers"):
        for name, value in state.get(group, {}).items():
            if value is not None and name not in unsaved:
                named[prefix + name] = _tensor(value)
    for name, module in state.get("_modules", {}).items():
        if module is None:
            continue
        if not isinstance(module, _Persistent | _Module):
            raise _refusal(f"something that is no module under the name {prefix}{name}")
        named |= _named_tensors(module, f"{prefix}{name}.")
    return named


def _tensor(value: Any) -> Tensor:
    """The tensor of a record; its shape and strides must lie within its storage."""
    if isinstance(value, _Parameter):
        value = value.arguments[0]
    if not isinstance(value, _Tensor):
        raise _refusal("a parameter that is no tensor")
    storage, offset, shape, strides = value.arguments[:4]
    if not isinstance(storage, _Storage):
        raise _refusal("a tensor without its bytes")
    whole = _values(*storage.arguments)
    if math.prod(shape) > len(whole):
        raise _refusal("a tensor that is larger than its bytes")
    # as_strided itself refuses what reaches outside the storage.
    return whole.as_strided(tuple(shape), tuple(strides), offset).float().clone()


def _values(data: bytes) -> Tensor:
    """All values of a storage: (N,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about its old kind of storage
        try:
            # A pickle within the pickle, as torch stores a tensor's bytes: read as strictly.
            flat = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its advice is to open the file unsafely
            raise _refusal(
                "something that is no tensor where a tensor's bytes should be"
            ) from error
        if not isinstance(flat, torch.TypedStorage):
            raise _refusal("something that is no tensor where a tensor's bytes should be")
        return torch.tensor([], dtype=flat.dtype).set_(flat.untyped())


def _without_filters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {}
    for name, value in tensors.items():
        if not name.endswith(_FILTER):
            kept[name] = value
        elif not torch.equal(value, _BOX):
            raise _Refused(
                f"{name} is not the mean of 2x2 pixels, so this is another architecture than ADM, "
                "the only one that is read: use edm-imagenet-64x64-cond-adm.pkl"
            )
    return kept
