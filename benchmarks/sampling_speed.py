"""Seconds per step of DMD2 Sampler against ComfyUI's own `lcm`, on the same model.

    python -m benchmarks.sampling_speed
    python -m benchmarks.sampling_speed --runs 40 --steps 16 --batch 4

The embedded teacher in a real ComfyUI, in this process (COMFYUI_PATH, or the one that the tests
download), through the functions behind KSampler and SamplerCustom. Both sides alternate, so that
what else the machine does falls on both alike; without a GPU it is this process's CPU time that
counts, summed over its threads.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SIDE_PX = 128


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="of each side (default 30)")
    parser.add_argument("--steps", type=int, default=16, help="per run (default 16)")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        ours, stock = _sides(Path(folder), options.steps, options.batch)
        for _ in range(3):
            ours(), stock()
        pairs = [_pair(ours, stock) for _ in range(options.runs)]
    _print(pairs, options.steps)
    return 0


def _pair(ours: Callable[[], Any], stock: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one run each, in random order."""
    seconds = {}
    for side in random.sample((ours, stock), 2):
        begin = _now()
        side()
        seconds[side] = _now() - begin
    return seconds[ours], seconds[stock]


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _print(pairs: Sequence[tuple[float, float]], steps: int) -> None:
    ours, stock = (sorted(side) for side in zip(*pairs, strict=True))
    for name, times in (("DMD2 Sampler", ours), ("lcm, simple", stock)):
        low, middle, high = statistics.quantiles(times, n=4)
        print(
            f"{name:<13} {1000 * middle / steps:8.2f} ms per step "
            f"(middle half of {len(times)} runs: {1000 * low / steps:.2f} to "
            f"{1000 * high / steps:.2f})"
        )
    ratios = [first / second for first, second in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"ratio         {middle:8.3f} (middle half {low:.3f} to {high:.3f}; mean "
        f"{statistics.fmean(ratios):.3f} +- {error:.3f})"
    )


def _sides(folder: Path, steps: int, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One complete sampling by our nodes, and by ComfyUI's."""
    pack = _comfyui_and_pack()
    import comfy.sample
    import comfy.sd
    from comfy.samplers import sampler_object

    from train_lora.demo.teacher import load_teacher
    from train_lora.models.saving import save_single_file

    save_single_file(load_teacher(), folder / "model.safetensors")
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(folder / "model.safetensors"))
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red ring", "")
    )
    latent = torch.zeros(batch, 4, SIDE_PX // 8, SIDE_PX // 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    common = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 1}
    load = importlib.import_module
    scheduler = load(f"{pack}.nodes.scheduler").Scheduler
    sampler = load(f"{pack}.nodes.sampler").Sampler

    def ours() -> Any:
        sigmas = scheduler.execute(model, steps, "", 1.0)[0]
        solver = sampler.execute(1.0, "", -1, "per image")[0]
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 1.0, solver, sigmas, disable_pbar=True, **common
            )

    def stock() -> Any:
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "simple", steps
        )
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 1.0, sampler_object("lcm"), sigmas, disable_pbar=True, **common
            )

    return ours, stock


def _comfyui_and_pack() -> str:
    """Make ComfyUI, the tests' tiny model and the pack importable; the pack's package name."""
    tests = REPOSITORY / "tests" / "comfy"
    sys.path.insert(0, str(tests))
    host = importlib.import_module("comfy_host").comfyui_folder()
    sys.path.remove(str(tests))
    sys.path.insert(0, str(host))  # its `nodes` goes before the repository's
    logging.disable(logging.INFO)
    importlib.import_module("comfy.cli_args").args.cpu = not torch.cuda.is_available()
    _import_as("tiny_sdxl", tests / "tiny_sdxl_node")
    _import_as("dmd2_pack", REPOSITORY)
    return "dmd2_pack"


def _import_as(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
