"""`dmd2 prepare`: filter, sort into buckets, encode once; shared by all ranks, and resumable.
`dmd2 pairs` fills its folder the same way.

The work is cut into units of a few dozen samples, each a file. Unit u is rank u's, counted round;
a file that is there with the right stamp is kept, so a killed preparation goes on with the rest
and a changed picture or caption costs its own unit only.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config
from .config_classes import has_classes
from .data import cache
from .data.encode import PROMPTS, Unit, digest, prompt_units, with_text
from .data.freshness import SOURCES, source_stamps
from .data.store import read_shard_facts, shard_stamp, write_shard
from .data.teacher_pairs import UNIT_PAIRS, pair_units
from .data.training_data import check_sources, read_training_prompts, real_image_units
from .distributed import join_processes, leave_processes
from .models.components import Components

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def prepare(config: Config, *, strict: bool = False) -> Path:
    """Fill `data.cache`; returns its report. ValueError for nothing to prepare or to use.

    `strict`: samples that cannot be used are an error, after everything else was encoded.
    """
    if has_classes(config):
        raise ValueError(
            'There is nothing to prepare: data.prompts is "classes", and pictures of classes are '
            "read from their files when they are needed."
        )
    if config.data.text == "online" and not config.needs_real_images:
        raise ValueError(
            'There is nothing to prepare: data.text is "online", and the run takes no real images.'
        )
    if config.data.cache is None:
        raise ValueError("data.cache is not set; name the folder to fill: --data.cache DIR.")
    cache.read_manifest(Path(config.data.cache))
    captions = read_training_prompts(config)
    check_sources(config)
    return _fill(
        cache.CACHE,
        config,
        lambda components: _named_units(config, components, captions),
        strict=strict,
    )


def make_pairs(config: Config) -> Path:
    """Fill `regression.pairs`; returns its report. ValueError where the run takes no pairs."""
    if not config.needs_pairs:
        raise ValueError(
            "There are no pairs to make: regression.warmup_iterations is 0 and training.objective "
            'is "dmd2"; change one of them, or take --preset sdxl-1step.'
        )
    captions = read_training_prompts(config)

    def units(components: Components) -> Iterator[tuple[str, Unit]]:
        for number, unit in enumerate(pair_units(config, components, captions)):
            if config.data.text == "cached":
                unit = _with_text(unit, components, config.data.resolution_px)
            yield f"{cache.PAIRS.noun}-{number:06d}.safetensors", unit

    total = math.ceil(config.regression.num_pairs / UNIT_PAIRS)
    return _fill(cache.PAIRS, config, units, strict=False, total=total)


def _fill(
    kind: cache.Kind,
    config: Config,
    units_of: Callable[[Components], Iterator[tuple[str, Unit]]],
    *,
    strict: bool,
    total: int | None = None,
) -> Path:
    """Write what the folder lacks of (name of the shard, unit); returns the report.

    `total`: the number of shards, where it is known beforehand.
    """
    from .model_setup import load_model
    from .models.placement import place_encoders

    folder, settings = kind.folder(config), kind.settings_of(config)
    assert folder is not None
    found = cache.read_manifest(folder, kind)
    state = join_processes(config.training.mixed_precision)
    log.info("loading the model %s", config.model.path)
    components = load_model(config, state.device)
    place_encoders(components, state.device)
    model = cache.model_identity(components)
    if found is not None:
        keys = found["settings"].keys() | settings.keys()
        wanted = {key: settings.get(key) for key in sorted(keys)}
        cache.check_identity(folder, found, model, wanted, kind)
    identity = {"format": cache.FORMAT, "model": model, "settings": settings}
    units = units_of(components)
    first = next(units, None)  # a source that cannot be read at all shows here
    if first is None:
        raise ValueError(f"data.real_images {config.data.real_images!r} is empty; fill it.")
    state.wait_for_everyone()  # all have looked at the folder
    if state.is_main_process:
        _begin(folder, identity, source_stamps(config, kind))
    state.wait_for_everyone()
    key = digest([json.dumps(identity, sort_keys=True)])
    names = _encode_own(folder, chain([first], units), key, state, total)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, names, identity, kind.noun, strict=strict)
    state.wait_for_everyone()
    leave_processes()
    return folder / cache.REPORT


def _named_units(
    config: Config, components: Components, captions: list[str]
) -> Iterator[tuple[str, Unit]]:
    px = config.data.resolution_px
    if config.data.text == "cached":
        for number, unit in enumerate(prompt_units(components, captions, px)):
            yield f"{PROMPTS}-{number:06d}.safetensors", unit
    if config.needs_real_images:
        pictures = real_image_units(config, components, captions, lenient=True)
        for number, unit in enumerate(pictures):
            if config.data.text == "cached":
                unit = _with_text(unit, components, px)
            yield f"{cache.CACHE.noun}-{number:06d}.safetensors", unit


def _with_text(unit: Unit, components: Components, px: int) -> Unit:
    """The same with the text embeddings of its captions."""
    return replace(unit, encode=lambda: with_text(components, unit.encode(), px))


def _begin(folder: Path, identity: dict[str, Any], stamps: dict[str, Any]) -> None:
    """From here on the cache is incomplete until `_finish`; nothing encoded is thrown away.

    `stamps`: of the sources, taken before any is read: what changes meanwhile is noticed later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.partial"):  # of a killed process
        partial.unlink()
    cache.write_json(folder / cache.MANIFEST, identity | {"complete": False, "shards": []})
    cache.write_json(folder / SOURCES, stamps)


def _encode_own(
    folder: Path,
    units: Iterable[tuple[str, Unit]],
    key: str,
    state: Accelerator,
    total: int | None,
) -> list[str]:
    """Write this rank's units that are not there yet; returns the names of all ranks' units."""
    from tqdm import tqdm

    names = []
    is_main = state.is_main_process
    bar = tqdm(units, desc="preparing", unit="shard", total=total, disable=not is_main)
    for number, (name, unit) in enumerate(bar):
        names.append(name)
        if number % state.num_processes != state.process_index:
            continue
        stamp = digest([key, unit.stamp()])
        if shard_stamp(folder / name) == stamp:
            continue
        write_shard(folder / name, unit.encode(), stamp)
    return names


def _finish(
    folder: Path, names: list[str], identity: dict[str, Any], noun: str, *, strict: bool
) -> None:
    """Report, then manifest, then remove shards of pictures that are no longer there."""
    shards, left_out = [], []
    counts: Counter[str] = Counter()
    for name in names:
        facts = read_shard_facts(folder / name)
        shard_counts = {part: len(captions) for part, captions in facts["captions"].items()}
        counts.update(shard_counts)
        left_out += facts["left_out"]
        shards.append(
            {
                "file": name,
                "num_bytes": (folder / name).stat().st_size,
                "counts": shard_counts,
            }
        )
    report = _report(counts, left_out, noun)
    cache.write_json(folder / cache.REPORT, report)
    _tell(report, noun)
    where = f"{folder / cache.REPORT} lists all"
    expects_pictures = identity["settings"].get("data.real_images") is not None
    if expects_pictures and not report["pictures"]:
        why = _summary(report) or "it is empty"
        raise ValueError(f"data.real_images has no usable picture ({why}); {where}; mend that.")
    if strict and left_out:
        raise ValueError(
            f"Some samples cannot be used ({_summary(report)}); {where}; mend or remove them and "
            "prepare again, or prepare without --strict."
        )
    cache.write_json(folder / cache.MANIFEST, identity | {"complete": True, "shards": shards})
    for prefix in (PROMPTS, noun):
        for path in folder.glob(f"{prefix}-*.safetensors"):
            if path.name not in names:
                path.unlink()
    print(folder / cache.REPORT)


def _report(counts: Counter[str], left_out: list[list[str]], noun: str) -> dict[str, Any]:
    reasons: dict[str, list[str]] = {}
    for reason, sentence in left_out:
        reasons.setdefault(reason, []).append(sentence)
    pictures = {part: count for part, count in sorted(counts.items()) if part != PROMPTS}
    return {
        "prompts": counts[PROMPTS],
        noun: sum(pictures.values()),
        "buckets": pictures,
        "num_left_out": {reason: len(reasons[reason]) for reason in sorted(reasons)},
        "left_out": {reason: reasons[reason] for reason in sorted(reasons)},
    }


def _summary(report: dict[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in report["num_left_out"].items())


def _tell(report: dict[str, Any], noun: str) -> None:
    if report["prompts"]:
        print(f"prompts: {report['prompts']}")
    print(f"{noun}: {report[noun]}")
    for size, count in report["buckets"].items():
        print(f"  {size}: {count}")
    if report["num_left_out"]:
        print(f"left out: {_summary(report)}")
