"""A published EDM checkpoint as safetensors: `dmd2 convert-edm`.

Nothing in the pickle is run (`models/edm_pickle.py`). The weights keep their names; all are
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .models.edm_network import infer_config, metadata_of
from .models.edm_pickle import read_edm_pickle
from .models.edm_unet import EDMConfig
from .models.safetensors_io import write_safetensors


def convert(source: Path, out: Path) -> EDMConfig:
    """Write the network of the pickle `source` to `out`; returns its size.

    ValueError if `source` holds anything else, or if `out` exists; nothing is written then.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} does not end in .safetensors: name a file that does")
    if out.exists():
        raise ValueError(f"{out} exists: name another file")
    tensors, settings = read_edm_pickle(source)
    shapes = {name: value.shape for name, value in tensors.items()}
    try:
        config = replace(infer_config(shapes, {}), sigma_data=_sigma_data(settings))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    write_safetensors(out, tensors, metadata_of(config))
    return config


def _sigma_data(settings: Mapping[str, Any]) -> float:
    value = settings.get("sigma_data", EDMConfig().sigma_data)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"sigma_data is {value!r}: the file is damaged, download it again")
    return float(value)
