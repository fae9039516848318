"""The commands of `dmd2` that make files out of files: export and merge."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "export",
        help="write a LoRA file from a checkpoint, also of a training that is running",
        allow_abbrev=False,
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT_OR_RUNDIR",
        help="the folder of a checkpoint or of a run",
    )
    command.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="of a run: newest (default), best (by validation.best) or an iteration such as 500",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write"
    )
    command.set_defaults(run=_export, takes_keys=False, parser=command)


def add_merge(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "merge",
        help="bake a few-step LoRA into a checkpoint, which keeps its recipe",
        allow_abbrev=False,
    )
    command.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT.safetensors", help="SDXL or SD1.5, one file"
    )
    command.add_argument("lora", type=Path, metavar="LORA.safetensors", help="the few-step LoRA")
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write"
    )
    command.add_argument(
        "--strength", type=float, default=1.0, help="of the LoRA; it was trained at 1 (default)"
    )
    command.add_argument(
        "--family",
        metavar="NAME",
        help="what a published LoRA without a recipe is, such as 'DMD2, 4 steps'",
    )
    command.set_defaults(run=_merge, takes_keys=False, parser=command)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix != ".safetensors":
        raise ValueError(f"--out is {str(arguments.out)!r}; name a file that ends in .safetensors.")
    if arguments.out.exists():
        raise ValueError(f"--out is {str(arguments.out)!r}, which exists; name another file.")
    from .export_checkpoint import export_checkpoint

    for path in export_checkpoint(arguments.source, arguments.out, arguments.checkpoint):
        print(path)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from .merge import merge

    merged = merge(
        arguments.checkpoint,
        arguments.lora,
        arguments.out,
        strength=arguments.strength,
        family=arguments.family,
    )
    print(merged.summary)
    return 0
