"""The mathematics of few-step distillation (DMD2), on torch alone.

Read in this order: schedule, prediction, few_step, then losses.
"""

from .discriminator import LayerHeads, MiddleBlockHead
from .divergence import Divergence, divergence_weight
from .families import FAMILIES, family_recipe
from .few_step import StepPlan, few_step_sample, initial_sample
from .guidance import both_branches, classifier_free_guidance, guided
from .losses import (
    approximate_r1_loss,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    edm_loss_weight,
    gan_critic_loss,
    gan_fake_loss,
    gan_generator_loss,
    gan_real_loss,
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
    "Divergence",
    "EDMScalings",
    "EDMSchedule",
    "FlowSchedule",
    "LayerHeads",
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
    "approximate_r1_loss",
    "both_branches",
    "classifier_free_guidance",
    "coefficients",
    "denoising_loss",
    "derived_generator",
    "derived_seed",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "divergence_weight",
    "edm_loss_weight",
    "edm_preconditioned",
    "edm_scalings",
    "family_recipe",
    "few_step_sample",
    "from_x0",
    "gan_critic_loss",
    "gan_fake_loss",
    "gan_generator_loss",
    "gan_real_loss",
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
