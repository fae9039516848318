"""The arguments of `dmd2 evaluate`. Imports nothing heavy: help and errors appear at once."""

from __future__ import annotations

import argparse
from pathlib import Path

DEMO = "demo"
_DRAWING = ("prompts", "lora", "guidance", "family", "steps", "size_px", "per_prompt", "seed")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        help="FID, patch FID, CLIP score, diversity, precision and recall of pictures or a model",
        usage="dmd2 evaluate (--images DIR | --model MODEL --prompts FILE.txt "
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
    draw.add_argument("--prompts", metavar="FILE.txt", help="one on each line; demo: the demo's 64")
    draw.add_argument("--lora", metavar="FILE", help="the student; without it the teacher draws")
    draw.add_argument("--guidance", type=float, metavar="G", help="of the teacher (SDXL: 6 to 8)")
    draw.add_argument(
        "--family", metavar="NAME", help="for a LoRA of another method, such as 'LCM, 4 steps'"
    )
    draw.add_argument("--steps", type=int, metavar="N", help="teacher 50, student as its LoRA says")
    draw.add_argument("--size-px", type=int, metavar="PX", help="side; as the model was made for")
    draw.add_argument("--per-prompt", type=int, metavar="N", help="pictures of each prompt (1)")
    draw.add_argument("--seed", type=int, metavar="N", help="of the noise (0)")
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
    command.set_defaults(run=_evaluate, takes_keys=False, parser=command)


def _evaluate(arguments: argparse.Namespace) -> int:
    given = [name for name in _DRAWING if getattr(arguments, name) is not None]
    if arguments.images is not None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option} is for drawing with --model; leave it out with --images.")
    if arguments.model is not None and arguments.prompts is None:
        raise ValueError("--model needs --prompts, a .txt file with a prompt on each line.")
    from .evaluate import Measures, evaluate
    from .render import RenderRequest

    measures = Measures(
        reference=arguments.reference,
        features=arguments.features,
        clip=arguments.clip,
        lpips=arguments.lpips,
        resize_px=arguments.resize_px,
    )
    if arguments.images is not None:
        evaluate(arguments.images, measures, arguments.out)
        return 0
    request = RenderRequest(
        model=arguments.model,
        lora=arguments.lora,
        prompts=tuple(_prompts(arguments.prompts)),
        per_prompt=1 if arguments.per_prompt is None else arguments.per_prompt,
        seed=0 if arguments.seed is None else arguments.seed,
        steps=arguments.steps,
        family=arguments.family,
        guidance=arguments.guidance,
        size_px=arguments.size_px,
    )
    evaluate(request, measures, arguments.out)
    return 0


def _prompts(source: str) -> list[str]:
    if source == DEMO:
        from .demo.measure import evaluation_scenes

        return [scene.caption for scene in evaluation_scenes()]
    from .data.prompts import read_prompt_lines

    return read_prompt_lines(Path(source), "--prompts")
