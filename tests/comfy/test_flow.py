"""LoRAs of flow models: the nodes refuse them, and what they advise instead is what was trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def adapter(pack):
    return pack("nodes.k_diffusion")


@pytest.fixture
def core(pack):
    return pack("dmd2_core")


def flow_sampling(adapter, shift: float = 1.0) -> Any:
    """What ComfyUI's ModelSamplingSD3 makes of an SDXL or SD1.5 model."""
    comfy = adapter.comfy.model_sampling
    sampling = type("Flow", (comfy.ModelSamplingDiscreteFlow, comfy.CONST), {})()
    sampling.set_parameters(shift=shift, multiplier=1000)
    return sampling


def network(x: Tensor, told: Tensor) -> Tensor:
    return torch.tanh(x.roll(1, -1) + told.float().reshape(-1, 1, 1, 1) / 1000 - 0.3)


@pytest.mark.parametrize(
    ("shift", "steps"), [(1.0, (999, 749, 499, 249)), (3.0, (999, 899, 749, 499))]
)
def test_comfyuis_lcm_sampler_does_what_was_trained(adapter, core, shift, steps):
    """With the scheduler "simple"; the network is told 1000 x flow time in both."""
    import importlib

    samplers = importlib.import_module("comfy.samplers")
    sampling = flow_sampling(adapter, shift)
    sigmas = samplers.simple_scheduler(sampling, len(steps))
    assert sigmas[:-1].tolist() == pytest.approx([(t + 1) / 1000 for t in steps])
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    told: list[float] = []

    def model(x: Tensor, sigma: Tensor, seed: int | None = None) -> Tensor:
        told.append(float(sampling.timestep(sigma)[0]))
        output = network(sampling.calculate_input(sigma, x), sampling.timestep(sigma))
        return sampling.calculate_denoised(sigma, output, x)

    patcher = SimpleNamespace(get_model_object=lambda name: sampling)
    model.inner_model = SimpleNamespace(model_patcher=patcher)
    start = sampling.noise_scaling(sigmas[0], eps.clone(), torch.zeros_like(eps), True)
    lcm = adapter.comfy.k_diffusion.sampling.sample_lcm
    theirs = lcm(model, start, sigmas, {"seed": 11}, None, True)
    assert told == pytest.approx([t + 1 for t in steps], rel=1e-6)

    schedule, plan = core.SteppedSchedule.flow(), core.StepPlan(timesteps=steps)
    denoiser = core.Denoiser(lambda x, t, _: network(x, t + 1), schedule, "flow")
    ours = core.few_step_sample(
        lambda x, t: denoiser(x, t, None),
        core.initial_sample(schedule, plan, eps),
        schedule,
        plan,
        noise=adapter.noise_for(eps, 11, "stock"),
    )
    # ComfyUI's table and sums are in float32.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_recipe_of_flow_is_never_sampled_by_the_nodes(adapter, core, pack):
    recipes = pack("nodes.recipes")
    recipe = core.Recipe(timesteps=(999, 749, 499, 249), prediction="flow")
    comfy = adapter.comfy.model_sampling
    epsilon = type("Epsilon", (comfy.ModelSamplingDiscrete, comfy.EPS), {})()
    x0 = type("X0", (comfy.ModelSamplingDiscrete, comfy.X0), {})()
    for sampling in (epsilon, x0, flow_sampling(adapter)):
        with pytest.raises(ValueError, match=r"trained on a flow-matching model.*ModelSamplingSD3"):
            recipes.check_fits(recipe, sampling)
    with pytest.raises(ValueError, match=r"which DMD2's nodes do not sample.*sampler lcm, schedul"):
        adapter.check_discrete(flow_sampling(adapter))
