"""`dmd2 evaluate`: figures of a folder of pictures, or of a model that first draws one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint_store import write_text
from .data.samples import file_stamp
from .distributed import join_processes, leave_processes, shared_out
from .metrics.clip import ClipScorer, load_clip
from .metrics.diversity import diversity
from .metrics.features import DEMO, Extractor, load_extractor
from .metrics.frechet import frechet_distance
from .metrics.looks import looks
from .metrics.lpips import Lpips, load_lpips
from .metrics.picture_folder import (
    PictureFolder,
    middle,
    pixels,
    read_folder,
    scaled_to,
    square,
)
from .metrics.precision_recall import precision_recall
from .output import check_output_directory
from .render import RenderRequest, check_rendering, render

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

RESULT_FILE = "metrics.json"
BATCH = 32
LOOKS = ("brightness", "contrast", "colour", "sharpness")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What to measure with; a figure whose network is None is not measured."""

    reference: str | None = None
    """A folder of real pictures, or "demo": scenes drawn for the demo's prompts."""
    features: str | None = None
    """"demo", or the file of Inception's weights."""
    clip: str | None = None
    lpips: Path | None = None
    resize_px: int | None = None
    """Side that pictures are brought to before all figures but patch FID and looks."""

    def __post_init__(self) -> None:
        if self.reference is not None and self.features is None:
            raise ValueError(
                "--reference needs a network to compare with: add --features, the file of "
                "Inception's weights, or demo for the embedded classifier."
            )
        if self.reference == DEMO and self.features != DEMO:
            raise ValueError("--reference demo goes with --features demo; name a folder instead.")
        if self.resize_px is not None and self.resize_px < 1:
            raise ValueError(f"--resize-px is {self.resize_px}; set it to at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The loaded networks of `Measures`."""

    extractor: Extractor | None
    clip: ClipScorer | None
    lpips: Lpips | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one pass over a folder found, a row for each picture."""

    features: Tensor
    """(N, D); D is 0 without an extractor."""
    patches: Tensor
    """(M, D) of the middle at full resolution, of the M pictures that are larger than it."""
    clip: Tensor
    """(N, 1), or (N, 0)."""
    looks: Tensor
    """(N, 4) in the order of `LOOKS`."""


def evaluate(source: Path | RenderRequest, measures: Measures, out: Path) -> dict[str, float]:
    """Measure a folder, or what a model draws into `out`; leaves `out`/metrics.json.

    All processes that torchrun started share the work; each returns the same figures.
    """
    if isinstance(source, RenderRequest):
        return evaluate_all({"": source}, measures, out)[""]
    if not _only_figures(out):
        check_output_directory(out, "--out")
    folder = read_folder(source, "--images")
    accelerator = join_processes("no")
    try:
        networks = _load(measures, accelerator.device)
        _check_captioned(folder.captions, networks)
        _check_enough(len(folder), networks.extractor, measures, "--images")
        reference = _reference(measures, networks, accelerator)
        return _measured(folder, reference, networks, measures, accelerator, out)
    finally:
        leave_processes()


def evaluate_all(
    requests: Mapping[str, RenderRequest], measures: Measures, out: Path
) -> dict[str, dict[str, float]]:
    """The figures of each system, which draws into the folder of its name below `out`.

    Everything that can be wrong is looked at before anything is drawn.
    """
    for name, request in requests.items():
        check_rendering(request, out / name)
    accelerator = join_processes("no")
    try:
        networks = _load(measures, accelerator.device)
        for request in requests.values():
            _check_captioned(request.captions, networks)
            _check_enough(len(request.captions), networks.extractor, measures, "the prompts")
        reference = _reference(measures, networks, accelerator)
        found = {}
        for name, request in requests.items():
            folder = read_folder(render(request, out / name, accelerator), "--out")
            found[name] = _measured(folder, reference, networks, measures, accelerator, out / name)
        return found
    finally:
        leave_processes()


def _measured(
    folder: PictureFolder,
    reference: Seen | None,
    networks: Networks,
    measures: Measures,
    accelerator: Accelerator,
    out: Path,
) -> dict[str, float]:
    figures, left_out = measure(folder, reference, networks, measures, accelerator)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / RESULT_FILE, figures, left_out, folder, measures)
        _show(figures, left_out, out / RESULT_FILE)
    return figures


def measure(
    folder: PictureFolder,
    reference: Seen | None,
    networks: Networks,
    measures: Measures,
    accelerator: Accelerator,
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures by name, and why others are not among them."""
    left_out = {}
    seen = look(folder, networks, measures, accelerator, "measuring")
    groups = folder.groups()
    figures: dict[str, float] = {}
    if reference is not None:
        figures["fid"] = frechet_distance(seen.features, reference.features)
        assert networks.extractor is not None
        enough, side = networks.extractor.width + 1, networks.extractor.side_px
        if min(len(seen.patches), len(reference.patches)) >= enough:
            figures["patch_fid"] = frechet_distance(seen.patches, reference.patches)
        else:
            left_out["patch_fid"] = (
                f"needs {enough} pictures larger than {side} x {side} px in each set, found "
                f"{len(seen.patches)} and {len(reference.patches)}"
            )
        precision, recall = precision_recall(seen.features, reference.features)
        figures |= {"precision": precision, "recall": recall}
    if networks.clip is not None:
        figures["clip_score"] = float(seen.clip.double().mean())
    if not groups:
        left_out["diversity"] = "needs captions that two or more pictures share"
    elif networks.extractor is not None:
        by_group = [diversity(seen.features[group][None]) for group in groups]
        figures["feature_diversity"] = sum(by_group) / len(by_group)
    if networks.lpips is not None and groups:
        figures["lpips_diversity"] = _lpips_diversity(
            folder, groups, networks, measures, accelerator
        )
    figures |= dict(zip(LOOKS, seen.looks.double().mean(0).tolist(), strict=True))
    return figures, left_out


def look(
    folder: PictureFolder,
    networks: Networks,
    measures: Measures,
    accelerator: Accelerator,
    what: str,
    *,
    captions: bool = True,
) -> Seen:
    """One pass over the pictures, shared by all processes. `captions`: whether CLIP is asked."""
    from tqdm import tqdm

    extractor, clip = networks.extractor, networks.clip if captions else None
    width = extractor.width if extractor is not None else 0
    widths = [width, width, 1 if clip is not None else 0, len(LOOKS)]
    columns = torch.zeros(len(folder), sum(widths), device=accelerator.device)
    pieces = [slice(i, min(i + BATCH, len(folder))) for i in range(0, len(folder), BATCH)]
    bar = tqdm(total=len(folder), desc=what, disable=not accelerator.is_main_process)

    def work(piece: slice) -> Tensor:
        numbers = range(piece.start, piece.stop)
        pictures = [folder.open(number) for number in numbers]
        squares = [square(picture, measures.resize_px) for picture in pictures]
        parts = []
        if extractor is not None:
            scaled = [scaled_to(picture, extractor.side_px) for picture in squares]
            parts.append(extractor.features(_batch(scaled)).cpu())
            parts.append(_patch_features(extractor, pictures))
        if clip is not None:
            assert folder.captions is not None
            parts.append(clip.scores(squares, folder.captions[piece])[:, None])
        found = [looks(pixels(picture)[None].float() / 127.5 - 1) for picture in pictures]
        parts.append(torch.tensor([[figures[name] for name in LOOKS] for figures in found]))
        bar.update(len(pictures) * accelerator.num_processes)
        return torch.cat(parts, 1).to(accelerator.device)

    table = shared_out(pieces, work, columns, together=False).cpu()
    bar.close()
    features, patches, scores, looked = table.split(widths, 1)
    patches = patches[~patches.isnan().any(1)]
    return Seen(features=features, patches=patches, clip=scores, looks=looked)


def _patch_features(extractor: Extractor, pictures: Sequence[Image]) -> Tensor:
    """(B, D) of each picture's middle; not-a-number where it is no larger than that."""
    side = extractor.side_px
    large = [number for number, picture in enumerate(pictures) if min(picture.size) > side]
    found = torch.full((len(pictures), extractor.width), torch.nan)
    if large:
        patches = _batch([middle(pictures[number], side) for number in large])
        found[large] = extractor.features(patches).cpu()
    return found


def _batch(pictures: Sequence[Image]) -> Tensor:
    return torch.stack([pixels(picture) for picture in pictures])


def _lpips_diversity(
    folder: PictureFolder,
    groups: list[list[int]],
    networks: Networks,
    measures: Measures,
    accelerator: Accelerator,
) -> float:
    lpips, device = networks.lpips, accelerator.device
    assert lpips is not None

    def work(number: int) -> Tensor:
        squares = [square(folder.open(i), measures.resize_px) for i in groups[number]]
        if len({picture.size for picture in squares}) > 1:
            raise ValueError(
                f"The pictures of {folder.captions[groups[number][0]]!r} differ in size; "  # type: ignore[index]
                "set --resize-px (512 in the paper) to compare them."
            )
        return torch.tensor(lpips.diversity(_batch(squares).to(device).float() / 127.5 - 1))

    into = torch.zeros(len(groups), device=device)
    return float(shared_out(range(len(groups)), work, into, together=False).double().mean())


def _load(measures: Measures, device: torch.device) -> Networks:
    """The networks; together they come first, so that no wrong path costs an hour of drawing."""
    return Networks(
        extractor=None if measures.features is None else load_extractor(measures.features, device),
        clip=None if measures.clip is None else load_clip(measures.clip, device),
        lpips=None if measures.lpips is None else load_lpips(measures.lpips).to(device),
    )


def _reference(measures: Measures, networks: Networks, accelerator: Accelerator) -> Seen | None:
    if measures.reference is None:
        return None
    assert networks.extractor is not None
    if measures.reference == DEMO:
        from .demo.classifier import load_classifier
        from .demo.measure import build_yardstick

        features = build_yardstick(load_classifier()).real_features
        nothing = torch.zeros(len(features), 0)
        return Seen(features=features, patches=nothing[:0], clip=nothing, looks=nothing)
    folder = read_folder(Path(measures.reference), "--reference")
    _check_enough(len(folder), networks.extractor, measures, "--reference")
    return look(folder, networks, measures, accelerator, "reference", captions=False)


def _check_enough(count: int, extractor: Extractor | None, measures: Measures, where: str) -> None:
    """A covariance of D features has full rank from D + 1 pictures on."""
    if measures.reference is None or extractor is None or count > extractor.width:
        return
    raise ValueError(
        f"FID with {extractor.width} features needs at least {extractor.width + 1} pictures in "
        f"each set (the paper took 10,000), but {where} has {count}; add pictures, or leave out "
        "--reference."
    )


def _check_captioned(captions: list[str] | None, networks: Networks) -> None:
    shared = captions is not None and len(set(captions)) < len(captions)
    if networks.clip is not None and captions is None:
        raise ValueError(
            "--clip needs captions: write them into .txt files beside the pictures, or into one "
            "metadata.jsonl."
        )
    if networks.lpips is not None and not shared:
        raise ValueError(
            "--lpips compares pictures of the same prompt, but no two share a caption; draw with "
            "--per-prompt 2 or more, or caption the pictures."
        )


def _only_figures(out: Path) -> bool:
    return out.is_dir() and {path.name for path in out.iterdir()} <= {RESULT_FILE}


def _write(
    path: Path,
    figures: dict[str, float],
    left_out: dict[str, str],
    folder: PictureFolder,
    measures: Measures,
) -> None:
    """What was measured with what, so that two such files can be compared with open eyes."""
    networks = {
        name: None if value is None else {"name": str(value), "file": file_stamp(Path(value))}
        for name in ("features", "clip", "lpips")
        for value in [getattr(measures, name)]
    }
    report = {
        "figures": figures,
        "left_out": left_out,
        "pictures": len(folder),
        "prompts": None if folder.captions is None else len(set(folder.captions)),
        "folder": str(folder.files[0].parent),
        "reference": measures.reference,
        "resize_px": measures.resize_px,
        **networks,
    }
    write_text(path, json.dumps(report, indent=2) + "\n")


def _show(figures: dict[str, float], left_out: dict[str, str], path: Path) -> None:
    for name, value in figures.items():
        print(f"{name:18}{value:>12.4f}")
    for name, reason in left_out.items():
        print(f"{name:18}{'-':>12}  {reason}")
    print(path)
