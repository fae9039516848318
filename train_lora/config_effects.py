"""Which options have no effect beside others: setting one of them is an error, not a silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from .config import SECTIONS, Config
from .config_classes import mark_classes


def ineffective_keys(config: Config) -> dict[str, tuple[str, ...]]:
    """Key -> the keys whose values leave it without effect."""
    found: dict[str, tuple[str, ...]] = {}

    def rest_of(section: str, switch: str) -> Iterator[str]:
        return (f"{section}.{f.name}" for f in fields(SECTIONS[section]) if f.name != switch)

    def mark(keys: Iterable[str], *switches: str) -> None:
        for key in keys:
            found.setdefault(key, switches)

    for section in ("gan", "distribution_matching"):
        if not getattr(config, section).enabled:
            mark(rest_of(section, "enabled"), f"{section}.enabled")
    if config.needs_real_images and config.data.real_images == "teacher":
        found.pop("distribution_matching.guidance", None)  # the teacher's images take it as well
    if config.needs_pairs or config.diversity_anchor.weight > 0:
        found.pop("distribution_matching.guidance", None)
    if not config.needs_pairs:
        of_pairs = rest_of("regression", "warmup_iterations")
        mark(of_pairs, "regression.warmup_iterations", "training.objective")
    if config.regression.warmup_iterations == 0:
        mark(["regression.learning_rate"], "regression.warmup_iterations")
    if config.regression.loss == "mse":
        mark(["regression.lpips_weights"], "regression.loss")
    if config.regression.loss != "lpips":
        mark(["regression.tiny_vae"], "regression.loss")
    if config.training.objective != "dmd":
        mark(["regression.weight"], "training.objective")
    _mark_anchor_and_guidance(config, mark)
    _mark_data(config, mark)
    mark_classes(config, mark)
    if config.sampling.timesteps:
        mark(["sampling.steps"], "sampling.timesteps")
    if config.validation.every == 0:
        mark(rest_of("validation", "every"), "validation.every")
    if config.validation.prompts:
        mark(["validation.num_prompts"], "validation.prompts")
    if not config.distribution_matching.enabled:  # its critic never learns to denoise
        mark(["validation.panels"], "distribution_matching.enabled")
    if config.student.kind == "full":
        mark(["student.alpha"], "student.kind")
    _mark_gan(config, mark)
    if config.critic.kind == "full":
        mark(["critic.rank", "critic.alpha"], "critic.kind")
    if config.model.path == "demo":
        mark(["model.prediction"], "model.path")
    if "wandb" not in config.logging.trackers:
        mark(["logging.project"], "logging.trackers")
    return found


def _mark_anchor_and_guidance(config: Config, mark: Callable[..., None]) -> None:
    if config.diversity_anchor.weight == 0:
        keys = ("diversity_anchor.timestep", "diversity_anchor.teacher_steps")
        mark(keys, "diversity_anchor.weight")
    if config.distribution_matching.guidance == 1.0:
        keys = ("guidance_weight", "guidance_timesteps")
        mark([f"distribution_matching.{k}" for k in keys], "distribution_matching.guidance")


def _mark_gan(config: Config, mark: Callable[..., None]) -> None:
    """The keys of [gan] that choices within it, or beside it, leave without effect."""
    of_teacher, denoises = config.gan.features == "teacher", config.distribution_matching.enabled
    if not config.gan.r1_weight:
        mark(["gan.r1_noise"], "gan.r1_weight")
    if of_teacher:  # the denoising pass is the critic's
        mark(["gan.shared_draw"], "gan.features")
    if not denoises:
        mark(["gan.shared_draw"], "distribution_matching.enabled")
    if of_teacher and not denoises:  # then nothing trains the critic
        of_critic = [f"critic.{name}" for name in ("rank", "alpha", "learning_rate")]
        mark(of_critic, "gan.features", "distribution_matching.enabled")


def _mark_data(config: Config, mark: Callable[..., None]) -> None:
    """The keys of [data] that the kinds of `prompts` and `real_images` leave without effect."""
    data, of_images = config.data, ("caption_column", "image_column", "min_size_px")
    if not config.needs_real_images:
        of_images += ("real_images", "teacher_images", "size_ids", "skip_small_buckets")
        mark([f"data.{k}" for k in of_images], "gan.enabled", "backward_simulation.enabled")
        if data.text == "online":  # there is nothing to keep
            mark(["data.cache"], "data.text", "gan.enabled", "backward_simulation.enabled")
    if data.real_images != "teacher":
        mark(["data.teacher_images"], "data.real_images")
    if data.real_images in ("demo", "teacher"):  # their sizes are the buckets' own
        mark([f"data.{k}" for k in (*of_images[:3], "size_ids")], "data.real_images")
    if data.prompts == "demo" or data.prompts.endswith(".txt"):
        mark(["data.prompt_column"], "data.prompts")
    sources = [s for s in (data.prompts, data.real_images) if s is not None]
    if not any(source.startswith("hub:") for source in sources):
        mark(["data.stream"], "data.prompts", "data.real_images")
    if all(source.endswith(".txt") or source in ("demo", "teacher") for source in sources):
        mark(["data.split"], "data.prompts", "data.real_images")


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
