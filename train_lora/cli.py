"""The command `dmd2`.

Everything heavy is imported inside the functions, so that help and errors appear at once. What the
user got wrong ends as one sentence on stderr and exit code 2; set DMD2_TRACEBACK=1 to see where.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .cli_edm import add_convert_edm
from .cli_evaluate import add_compare, add_evaluate
from .cli_files import add_export, add_merge
from .cli_pairs import add_pairs
from .inputs import check_data, check_inputs, check_model
from .messages import show_messages
from .output import check_output_directory, run_and_iteration
from .stop import TrainingStopped
from .user_errors import user_sentence

if TYPE_CHECKING:
    from .config_load import LoadedConfig

USER_ERROR, INTERRUPTED = 2, 130


class _UsageError(ValueError):
    """What argparse found wrong with the command line."""


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors, and help that lists the keys where they can be given."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.get_default("takes_keys"):
            return text
        from .config_text import key_reference

        return (
            f"{text}\nkeys (a name that only one section has may stand alone: --iterations 100):\n"
            f"{key_reference()}\n"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    show_messages()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\ndmd2: interrupted", file=sys.stderr)
        return INTERRUPTED
    except TrainingStopped as stop:
        if _is_first_process():
            print(f"dmd2: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None  # type: ignore[assignment]  # nothing is flushed into it at exit
        return 0
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        if os.environ.get("DMD2_TRACEBACK"):
            traceback.print_exc()
        print(f"dmd2: error: {sentence}", file=sys.stderr)
        return USER_ERROR


def _is_first_process() -> bool:
    """All processes come to the same end, and one says so."""
    return os.environ.get("RANK", "0") == "0"


def _print_once(result: object) -> None:
    if _is_first_process():
        print(result)


def _run(argv: Sequence[str]) -> int:
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_keys:
        arguments.parser.error(f"unknown argument {rest[0]!r}")
    arguments.overrides = pair_overrides(rest)
    return int(arguments.run(arguments))


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dmd2",
        description="Distil a diffusion model into a LoRA that makes images in a few steps (DMD2).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    add_export(commands)
    add_merge(commands)
    add_evaluate(commands)
    add_compare(commands)
    _add_prepare(commands)
    add_pairs(commands, _add_config_sources, _load_config)
    add_convert_edm(commands)
    _add_demo(commands)
    _add_teacher(commands)
    _add_config(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"dmd2 {version('dmd2')}")
        except PackageNotFoundError:
            print("dmd2 (not installed: running from its folder)")
        parser.exit()


def _add_config_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE.toml", help="configuration file")
    command.add_argument(
        "--preset", metavar="NAME", help="values to start from: see dmd2 config --presets"
    )
    command.add_argument(
        "--ablate",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a part of the method out: no-gan, no-distribution-matching, "
        "no-backward-simulation, critic-1to1 (may be repeated)",
    )


def _add_train(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train",
        help="distil a teacher into a LoRA",
        usage="dmd2 train (--config FILE.toml | --resume RUNDIR_OR_CHECKPOINT) [--preset NAME] "
        "[--ablate NAME] [--key value ...]",
        allow_abbrev=False,
    )
    command.add_argument(
        "--resume",
        type=Path,
        metavar="RUNDIR_OR_CHECKPOINT",
        help="go on with this run and its config.toml, from its newest complete checkpoint or "
        "the one named (what came after that is set aside); --key value changes what it may",
    )
    _add_config_sources(command)
    command.set_defaults(run=_train, takes_keys=True, parser=command)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "prepare",
        help="encode prompts and real images once, into the folder data.cache",
        usage="dmd2 prepare --config FILE.toml [--preset NAME] [--strict] [--key value ...]",
        allow_abbrev=False,
    )
    _add_config_sources(command)
    command.add_argument(
        "--strict",
        action="store_true",
        help="fail if any sample had to be left out, after the others were encoded",
    )
    command.set_defaults(run=_prepare, takes_keys=True, parser=command)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="distil the embedded teacher, compare teacher and student",
        allow_abbrev=False,
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results")
    command.add_argument("--seed", type=_seed, default=0, help="seed of everything random")
    command.set_defaults(run=_demo, takes_keys=False, parser=command)


def _add_teacher(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "teacher",
        help="write the embedded teacher as a checkpoint",
        allow_abbrev=False,
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to"
    )
    command.add_argument(
        "--format",
        choices=("diffusers", "single", "both"),
        default="both",
        help="a diffusers folder, one SDXL-format .safetensors file, or both (default)",
    )
    command.set_defaults(run=_teacher, takes_keys=False, parser=command)


def _add_config(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "config",
        help="show a configuration, or list all keys or presets",
        usage="dmd2 config (--keys | --presets | --show [--config FILE.toml] [--preset NAME] "
        "[--ablate NAME] [--key value ...])",
        allow_abbrev=False,
    )
    action = command.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--show",
        dest="run",
        action="store_const",
        const=_config_show,
        help="every value and its origin: default, preset, file or cli; what must still be set",
    )
    action.add_argument(
        "--keys",
        dest="run",
        action="store_const",
        const=_config_keys,
        help="every key with its meaning, range and default",
    )
    action.add_argument(
        "--presets",
        dest="run",
        action="store_const",
        const=_config_presets,
        help="every preset and what it is for",
    )
    _add_config_sources(command)
    command.set_defaults(takes_keys=True, parser=command)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        return _resume(arguments)
    loaded = _load_config(arguments)
    check_output_directory(loaded.config.output.directory, "--output.directory")
    check_inputs(loaded.config, warm=True)
    from .trainer import train

    _print_once(train(loaded.config).lora)
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    from .config_load import load, resolve_key

    if arguments.config or arguments.preset or arguments.ablate:
        raise _UsageError("--resume takes the run's own config.toml; change it by --key value.")
    if any(resolve_key(name) == "output.directory" for name, _ in arguments.overrides):
        raise _UsageError("--resume names the run's folder already; remove --output.directory.")
    run, iteration = run_and_iteration(arguments.resume)
    config_file = run / "config.toml"
    if not config_file.is_file():
        raise ValueError(f"{run} holds no run to resume: there is no {config_file}.")
    overrides = [("output.directory", str(run)), *arguments.overrides]
    config = load(file=config_file, overrides=overrides).config
    check_inputs(config, warm=False)
    from .trainer import resume

    _print_once(resume(config, iteration=iteration).lora)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    loaded = _load_config(arguments)
    check_model(loaded.config)
    check_data(loaded.config)
    from .prepare import prepare

    prepare(loaded.config, strict=arguments.strict)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    check_output_directory(arguments.out, "--out")
    from .demo.run import run_demo

    run_demo(arguments.out, arguments.seed)
    return 0


def _teacher(arguments: argparse.Namespace) -> int:
    check_output_directory(arguments.out, "--out")
    from .demo.teacher import load_teacher
    from .models.saving import save_diffusers_folder, save_single_file

    components = load_teacher()
    folder, file = (
        arguments.out / "dmd2_demo_teacher",
        arguments.out / "dmd2_demo_teacher.safetensors",
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.format in ("diffusers", "both"):
        save_diffusers_folder(components, folder)
        print(folder)
    if arguments.format in ("single", "both"):
        save_single_file(components, file)
        print(file)
    return 0


def _config_show(arguments: argparse.Namespace) -> int:
    from .config_load import load_unfinished
    from .config_text import show

    print(show(load_unfinished(**_config_sources(arguments))), end="")
    return 0


def _config_keys(arguments: argparse.Namespace) -> int:
    from .config_text import key_reference

    _refuse_values(arguments, "--keys lists all keys")
    print(key_reference())
    return 0


def _config_presets(arguments: argparse.Namespace) -> int:
    from .config_load import presets

    _refuse_values(arguments, "--presets lists all presets")
    width = max(map(len, presets()))
    for name, purpose in presets().items():
        print(f"{name:<{width}}  {purpose}")
    return 0


def _refuse_values(arguments: argparse.Namespace, what: str) -> None:
    if arguments.config or arguments.preset or arguments.ablate or arguments.overrides:
        raise _UsageError(f"{what} and takes no values; use --show with them.")


def _load_config(arguments: argparse.Namespace) -> LoadedConfig:
    from .config_load import load

    return load(**_config_sources(arguments))


def _config_sources(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "preset": arguments.preset,
        "file": arguments.config,
        "overrides": arguments.overrides,
        "ablations": arguments.ablate,
    }


def pair_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--key value` and `--key=value` as (key, value)."""
    pairs: list[tuple[str, str]] = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--") or word == "--":
            raise _UsageError(f"Unexpected argument {word!r}; write options as --key value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                raise _UsageError(f"--{name} has no value; write --{name} VALUE.")
            value = following
        pairs.append((name, value))
    return pairs


def _seed(text: str) -> int:
    from .config_section import LARGEST_SEED

    if not text.isdecimal() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is no seed; give a whole number from 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
