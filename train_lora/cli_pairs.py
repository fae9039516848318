"""The command `dmd2 pairs`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from .inputs import check_data, check_model

if TYPE_CHECKING:
    from .config_load import LoadedConfig


def add_pairs(
    commands: argparse._SubParsersAction,
    add_config_sources: Callable[[argparse.ArgumentParser], None],
    load_config: Callable[[argparse.Namespace], LoadedConfig],
) -> None:
    """`add_config_sources`, `load_config`: as for the other commands that take keys."""
    command = commands.add_parser(
        "pairs",
        help="let the teacher make (noise, image) pairs, into the folder regression.pairs",
        usage="dmd2 pairs [--config FILE.toml] [--preset NAME] [--key value ...]",
        allow_abbrev=False,
    )
    add_config_sources(command)

    def run(arguments: argparse.Namespace) -> int:
        config = load_config(arguments).config
        check_model(config)
        check_data(config, pictures=False)
        from .prepare import make_pairs

        make_pairs(config)
        return 0

    command.set_defaults(run=run, takes_keys=True, parser=command)
