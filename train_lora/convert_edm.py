"""A published EDM checkpoint as safetensors.

`python -m train_lora.convert_edm IN.pkl OUT.safetensors`. Nothing in the pickle is run
(`models/edm_pickle.py`). The weights keep their names; all are float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .models.edm_network import infer_config, metadata_of
from .models.edm_pickle import read_edm_pickle
from .models.edm_unet import EDMConfig
from .models.safetensors_io import write_safetensors
from .user_errors import user_sentence


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train_lora.convert_edm",
        description="Write a published EDM checkpoint of the ADM architecture as safetensors.",
    )
    parser.add_argument(
        "source", type=Path, metavar="IN.pkl", help="such as edm-imagenet-64x64-cond-adm.pkl"
    )
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    arguments = parser.parse_args(argv)
    try:
        config = convert(arguments.source, arguments.out)
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        print(f"dmd2: {sentence}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {config.resolution_px} px, {config.classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
