"""The mathematics of few-step distillation (DMD2), on torch alone.

Read in this order: schedule, prediction, few_step, then losses.
"""

from .discriminator import MiddleBlockHead
from .families import FAMILIES, family_recipe
from .few_step import StepPlan, few_step_sample, initial_sample
from .guidance import classifier_free_guidance, guided
from .losses import (
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    edm_loss_weight,
    gan_critic_loss,
    gan_generator_loss,
    regression_loss,
    sample_gradient,
)
from .noise import INITIAL_STEP, SeededNoise, derived_generator, derived_seed, initial_noise
from .prediction import (
    Denoiser,
    EDMScalings,
    Prediction,
    edm_preconditioned,
    edm_scalings,
    from_x0,
    target,
    to_x0,
)
from .recipe import Recipe
from .schedule import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    SteppedSchedule,
    VPSchedule,
    add_noise,
    coefficients,
    k_sigma,
)
from .step_range import StepCounts, step_ranges

__all__ = [
    "FAMILIES",
    "INITIAL_STEP",
    "Denoiser",
    "EDMScalings",
    "EDMSchedule",
    "FlowSchedule",
    "MiddleBlockHead",
    "NoiseSchedule",
    "Prediction",
    "Recipe",
    "SeededNoise",
    "StepCounts",
    "StepPlan",
    "SteppedSchedule",
    "VPSchedule",
    "add_noise",
    "classifier_free_guidance",
    "coefficients",
    "denoising_loss",
    "derived_generator",
    "derived_seed",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "edm_loss_weight",
    "edm_preconditioned",
    "edm_scalings",
    "family_recipe",
    "few_step_sample",
    "from_x0",
    "gan_critic_loss",
    "gan_generator_loss",
    "guided",
    "initial_noise",
    "initial_sample",
    "k_sigma",
    "regression_loss",
    "sample_gradient",
    "step_ranges",
    "target",
    "to_x0",
]
