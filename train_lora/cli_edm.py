"""The command `dmd2 convert-edm`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_convert_edm(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "convert-edm",
        help="write a published EDM checkpoint (ADM architecture, a pickle) as safetensors",
        description="Nothing in the pickle is run. See docs/imagenet.md.",
        allow_abbrev=False,
    )
    command.add_argument(
        "source", type=Path, metavar="IN.pkl", help="such as edm-imagenet-64x64-cond-adm.pkl"
    )
    command.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    command.set_defaults(run=_convert, takes_keys=False, parser=command)


def _convert(arguments: argparse.Namespace) -> int:
    from .convert_edm import convert

    config = convert(arguments.source, arguments.out)
    print(f"{arguments.out}: {config.resolution_px} px, {config.classes} classes")
    return 0
