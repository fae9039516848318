"""Whether the files that a configuration names are there: looked at before the slow imports."""

from __future__ import annotations

from pathlib import Path

from .config import Config
from .config_regression import TINY_VAE_SOURCE, WEIGHT_SOURCES, RegressionConfig
from .data.rows import HUB
from .data.settings import CLASSES
from .models.places import check_model_path
from .output import run_and_iteration


def check_inputs(config: Config, *, warm: bool) -> None:
    """ValueError for a model, LoRA, prompts or pictures that do not exist.

    `warm`: whether the run will start from `student.init` or `training.continue_from`, where one
    is set.
    """
    check_model(config)
    init = config.student.init
    if warm and init is not None and not Path(init).exists():
        raise ValueError(
            f"student.init is {init!r}, which does not exist; name a LoRA file, or leave it out."
        )
    earlier = config.training.continue_from
    if warm and earlier is not None and not run_and_iteration(Path(earlier))[0].is_dir():
        raise ValueError(
            f"training.continue_from is {earlier!r}, which is no folder; name the folder of a run, "
            "or one of its checkpoints, such as RUN/checkpoints/000500."
        )
    pairs = config.regression.pairs
    if config.needs_pairs and pairs is not None and not Path(pairs).is_dir():
        raise ValueError(
            f"regression.pairs is {pairs!r}, which does not exist; run dmd2 pairs with this "
            "configuration, which fills it."
        )
    if config.needs_pairs:
        check_regression_files(config.regression)
    if config.data.cache is None:  # else it holds their content, perhaps on another machine
        check_data(config)


def check_model(config: Config) -> None:
    if config.model.path != "demo":
        check_model_path(config.model.path)


def check_data(config: Config, *, pictures: bool = True) -> None:
    """`pictures`: whether real images are looked for where the run takes any."""
    sources = {"data.prompts": config.data.prompts}
    if pictures and config.needs_real_images:
        assert config.data.real_images is not None
        sources["data.real_images"] = config.data.real_images
    for key, source in sources.items():
        if source in ("demo", "teacher", CLASSES) or source.startswith(HUB):
            continue
        if not Path(source).exists():
            raise ValueError(
                f"{key} is {source!r}, which does not exist; name a file or folder, or write "
                "hub:OWNER/NAME for a dataset of the Hugging Face hub."
            )


def check_regression_files(settings: RegressionConfig) -> None:
    sources = {"lpips_weights": WEIGHT_SOURCES.get(settings.loss), "tiny_vae": TINY_VAE_SOURCE}
    for key, source in sources.items():
        path = getattr(settings, key)
        if path is not None and not Path(path).exists():
            raise ValueError(
                f"regression.{key} is {path!r}, which does not exist, and nothing is downloaded "
                f"here: get it from {source} and name it."
            )
