"""The benchmark of diversity: its variants are configurations, its table tells mean and spread."""

from __future__ import annotations

from pathlib import Path

from benchmarks.diversity import VARIANTS, run_of, table
from train_lora.config_effects import value_of


def test_every_variant_changes_the_demo_as_it_says(tmp_path: Path) -> None:
    plain = run_of("paper", 0).config(tmp_path)
    for name, settings in VARIANTS.items():
        config = run_of(name, 0).config(tmp_path)
        assert config.training == plain.training
        for key in settings:
            assert value_of(config, key) != value_of(plain, key), name


def test_the_table_has_means_and_sample_deviations() -> None:
    figures = {"frechet_distance": 30.0, "prompt_accuracy": 0.95, "diversity": 17.0}
    others = {"frechet_distance": 32.0, "prompt_accuracy": 0.97, "diversity": 18.0}
    assert table({"paper": [figures, others], "anchor": [others]}).splitlines()[2:] == [
        "| paper | 2 | 31.0 ± 1.4 | 0.960 ± 0.014 | 17.50 ± 0.71 |",
        "| anchor | 1 | 32.0 | 0.970 | 18.00 |",
    ]
