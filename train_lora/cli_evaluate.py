"""The arguments of `dmd2 evaluate` and `dmd2 compare`.

Imports nothing heavy: help and errors appear at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluate import Measures
    from .render import RenderRequest

DEMO = "demo"
_PROMPTS_HELP = "a .txt with one on each line, a .tsv, .csv, .jsonl; demo: the demo's 64"
_DRAWING = (
    *("prompts", "prediction", "lora", "guidance", "family", "steps"),
    *("size_px", "per_prompt", "seed"),
)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        help="FID, patch FID, CLIP score, diversity, precision and recall of pictures or a model",
        usage="dmd2 evaluate (--images DIR | --model MODEL --prompts FILE "
        "(--lora FILE | --guidance G)) --out DIR [options]",
        description="What is given is measured: --reference with --features for FID, patch FID, "
        "precision and recall, --clip for the CLIP score, --lpips for diversity. See "
        "docs/metrics.md.",
        allow_abbrev=False,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="DIR", help="measure these pictures")
    source.add_argument(
        "--model", metavar="MODEL", help="draw pictures first: a file, folder, hub id, or demo"
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="metrics.json, and what is drawn"
    )
    draw = command.add_argument_group("drawing, with --model")
    draw.add_argument("--prompts", metavar="FILE", help=_PROMPTS_HELP)
    draw.add_argument("--lora", metavar="FILE", help="the student; without it the teacher draws")
    draw.add_argument("--guidance", type=float, metavar="G", help="of the teacher (SDXL: 6 to 8)")
    draw.add_argument(
        "--family", metavar="NAME", help="for a LoRA of another method, such as 'LCM, 4 steps'"
    )
    draw.add_argument("--steps", type=int, metavar="N", help="teacher 50, student as its LoRA says")
    _add_drawing(draw)
    _add_measuring(command)
    command.set_defaults(run=_evaluate, takes_keys=False, parser=command)


def add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="the same prompts and noise through teacher and LoRAs: one grid and one table",
        usage="dmd2 compare --model MODEL --prompts FILE --guidance G [--lora FILE ...] "
        "[--other FAMILY FILE ...] --out DIR [options]",
        description="Each system is drawn and measured as dmd2 evaluate does it. See "
        "docs/metrics.md.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", required=True, metavar="MODEL", help="a file, folder, hub id, or demo"
    )
    command.add_argument("--prompts", required=True, metavar="FILE", help=_PROMPTS_HELP)
    command.add_argument(
        "--guidance", type=float, required=True, metavar="G", help="of the teacher (SDXL: 6 to 8)"
    )
    command.add_argument("--steps", type=int, metavar="N", help="of the teacher (50)")
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE", help="one that says its steps"
    )
    command.add_argument(
        "--lora-steps",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="draw with each --lora in N steps; once for each number",
    )
    command.add_argument(
        "--other",
        action="append",
        default=[],
        nargs=2,
        metavar=("FAMILY", "FILE"),
        help="a LoRA of another method, such as 'LCM, 4 steps' lcm.safetensors",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="grid.png, table.md, pictures"
    )
    _add_drawing(command)
    _add_measuring(command)
    command.set_defaults(run=_compare, takes_keys=False, parser=command)


def _add_drawing(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--prediction",
        choices=("auto", "epsilon", "v", "v-zero-snr", "flow"),
        help="what the model predicts, if its file does not say it (auto)",
    )
    command.add_argument(
        "--size-px", type=int, metavar="PX", help="side; as the model was made for"
    )
    command.add_argument("--per-prompt", type=int, metavar="N", help="pictures of each prompt (1)")
    command.add_argument("--seed", type=int, metavar="N", help="of the noise (0)")


def _add_measuring(command: argparse.ArgumentParser) -> None:
    with_what = command.add_argument_group("measuring")
    with_what.add_argument(
        "--reference", metavar="DIR", help="real pictures to compare with; demo: drawn scenes"
    )
    with_what.add_argument(
        "--features", metavar="FILE", help="Inception's weights; demo: the embedded classifier"
    )
    with_what.add_argument("--clip", metavar="DIR", help="a CLIP model's folder, or hub:OWNER/NAME")
    with_what.add_argument(
        "--lpips", type=Path, metavar="FILE", help="torchvision's AlexNet or VGG16 weights"
    )
    with_what.add_argument(
        "--resize-px", type=int, metavar="PX", help="scale pictures first (the paper: 512)"
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    given = [name for name in _DRAWING if getattr(arguments, name) is not None]
    if arguments.images is not None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option} is for drawing with --model; leave it out with --images.")
    if arguments.model is not None and arguments.prompts is None:
        raise ValueError("--model needs --prompts, such as a .txt file with one on each line.")
    from .evaluate import evaluate

    measures = _measures(arguments)
    if arguments.images is not None:
        evaluate(arguments.images, measures, arguments.out)
    else:
        request = _request(arguments, lora=arguments.lora, family=arguments.family)
        evaluate(request, measures, arguments.out)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if not arguments.lora and not arguments.other:
        raise ValueError("There is nothing to compare the teacher with; give --lora or --other.")
    if arguments.lora_steps and not arguments.lora:
        raise ValueError("--lora-steps is for --lora, and none is given; leave it out.")
    from .compare import Student, compare

    numbers = arguments.lora_steps or [None]
    students = [Student(lora=lora, steps=steps) for lora in arguments.lora for steps in numbers]
    students += [Student(lora=lora, family=family) for family, lora in arguments.other]
    compare(_request(arguments), students, _measures(arguments), arguments.out)
    return 0


def _measures(arguments: argparse.Namespace) -> Measures:
    from .evaluate import Measures

    return Measures(
        reference=arguments.reference,
        features=arguments.features,
        clip=arguments.clip,
        lpips=arguments.lpips,
        resize_px=arguments.resize_px,
    )


def _request(
    arguments: argparse.Namespace, lora: str | None = None, family: str | None = None
) -> RenderRequest:
    from .render import RenderRequest

    return RenderRequest(
        model=arguments.model,
        prediction=arguments.prediction or "auto",
        lora=lora,
        prompts=tuple(_prompts(arguments.prompts)),
        per_prompt=1 if arguments.per_prompt is None else arguments.per_prompt,
        seed=0 if arguments.seed is None else arguments.seed,
        steps=arguments.steps,
        family=family,
        guidance=arguments.guidance,
        size_px=arguments.size_px,
    )


def _prompts(source: str) -> list[str]:
    if source == DEMO:
        from .demo.measure import evaluation_scenes

        return [scene.caption for scene in evaluation_scenes()]
    from .data.prompts import read_prompt_file

    return read_prompt_file(Path(source), "--prompts")
