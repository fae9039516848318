"""The recipes of published families against the schedulers that their authors name."""

from __future__ import annotations

import warnings

import pytest

from dmd2_core import FAMILIES, family_recipe

SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if "1 step" not in name])
def test_timesteps_are_those_of_the_authors_scheduler(family):
    import diffusers

    if family.startswith("LCM"):
        scheduler = diffusers.LCMScheduler(**SETTINGS)
    elif family.startswith("SDXL-Lightning"):
        scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **SETTINGS)
    elif family.startswith("Hyper-SD"):
        scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", **SETTINGS)
    else:
        assert family == "DMD2, 4 steps"
        assert FAMILIES[family].timesteps == (999, 749, 499, 249)
        return
    num_steps = int(family.split(", ")[1].split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' with numpy
        scheduler.set_timesteps(num_steps)
    assert [int(t) for t in scheduler.timesteps] == list(FAMILIES[family].timesteps)


def test_consistency_style_has_fresh_noise_and_trajectory_style_none():
    for family, recipe in FAMILIES.items():
        is_trajectory = "Lightning" in family or ("Hyper" in family and "1 step" not in family)
        assert recipe.strength == (0.0 if is_trajectory else 1.0), family
        assert recipe.guidance == 1.0


def test_one_step_families_tell_their_timestep():
    told = {name: FAMILIES[name].conditioning_timestep for name in FAMILIES if "1 step" in name}
    assert told == {
        "DMD2, 1 step": 399,
        "Hyper-SD, 1 step LoRA": None,
        "Hyper-SD, 1 step UNet": 800,
        "SDXL-Turbo, 1 step": None,
    }


def test_a_family_takes_the_models_prediction():
    recipe = family_recipe("LCM, 4 steps", "v", True)
    assert (recipe.prediction, recipe.zero_terminal_snr) == ("v", True)
    assert recipe.timesteps == FAMILIES["LCM, 4 steps"].timesteps
    with pytest.raises(ValueError, match="family is 'LCM': choose one of DMD2, 4 steps, "):
        family_recipe("LCM")
