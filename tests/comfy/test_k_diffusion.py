"""nodes/k_diffusion.py against ComfyUI's own model_sampling and lcm sampler, in this process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

Pack = Callable[[str], ModuleType]
KINDS = ("epsilon", "v", "v with zero terminal SNR")
SHAPE = (3, 4, 8, 8)


@pytest.fixture
def adapter(pack: Pack) -> ModuleType:
    return pack("nodes.k_diffusion")


@pytest.fixture
def core(pack: Pack) -> ModuleType:
    return pack("dmd2_core")


def model_sampling(adapter: ModuleType, kind: str, base: str = "ModelSamplingDiscrete") -> Any:
    """What ComfyUI makes for an SDXL checkpoint of this kind."""
    comfy = adapter.comfy.model_sampling
    mixin = comfy.EPS if kind == "epsilon" else comfy.V_PREDICTION
    sampling = type("ModelSampling", (getattr(comfy, base), mixin), {})
    settings = {"linear_start": 0.00085, "linear_end": 0.012, "zsnr": "zero" in kind}
    return sampling(SimpleNamespace(sampling_settings=settings))


def network(x: Tensor, t: Tensor) -> Tensor:
    """Some smooth function of the scaled input and the timestep, of unit size."""
    return torch.tanh(x.roll(1, -1) + t.float().reshape(-1, 1, 1, 1) / 1000 - 0.3)


class Model:
    """What a sampler function is given: (x, sigma) -> x0, by way of ComfyUI's conversions."""

    def __init__(self, sampling: Any) -> None:
        patcher = SimpleNamespace(get_model_object=lambda name: sampling)
        inner = SimpleNamespace(model_sampling=sampling)
        self.inner_model = SimpleNamespace(inner_model=inner, model_patcher=patcher)
        self.sampling = sampling
        self.told: list[int] = []

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        seed: int | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> Tensor:
        t = self.sampling.timestep(sigma)
        self.told.append(int(t[0]))
        output = network(self.sampling.calculate_input(sigma, x), t)
        x0 = self.sampling.calculate_denoised(sigma, output, x)
        for look in (model_options or {}).get("sampler_post_cfg_function", ()):
            x0 = look({"denoised": x0, "uncond_denoised": x0})  # CFG++ samplers ask for these
        return x0


def start(sampling: Any, sigmas: Tensor, eps: Tensor) -> Tensor:
    """Pure noise as ComfyUI scales it for an empty latent."""
    is_max = math.isclose(float(sigmas[0]), float(sampling.sigma_max), rel_tol=1e-5)
    return sampling.noise_scaling(sigmas[0], eps.clone(), torch.zeros_like(eps), is_max)


@pytest.fixture
def eps() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_sigmas_are_the_models_own_at_the_trained_timesteps(adapter, core, kind, num_steps):
    sampling = model_sampling(adapter, kind)
    plan = core.StepPlan.evenly(num_steps)
    sigmas = adapter.sigmas_of(plan, sampling)
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    assert torch.equal(sigmas[:-1], sampling.sigmas[list(plan.timesteps)])
    assert sampling.timestep(sigmas[:-1]).tolist() == list(plan.timesteps)


def test_comfyuis_table_is_dmd2_cores(adapter, core):
    table = model_sampling(adapter, "epsilon").sigmas.double()
    ours = core.VPSchedule.sdxl().k_sigma(torch.arange(1000))
    # ComfyUI computes in float64 and stores float32.
    torch.testing.assert_close(ours, table, rtol=1e-6, atol=0)


def test_starting_later_leaves_sigmas_out(adapter, core):
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4, start=2), sampling)
    assert torch.equal(sigmas[:-1], sampling.sigmas[[499, 249]])


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_at_the_conditioning_timestep_is_the_formula(adapter, core, kind, eps):
    sampling = model_sampling(adapter, kind)
    before = sampling.sigmas.clone()
    cut = adapter.truncated(sampling, 399)
    assert isinstance(cut, type(sampling))
    assert type(cut).__name__ == type(sampling).__name__
    assert torch.equal(sampling.sigmas, before)
    assert torch.equal(cut.sigmas, before[:400])
    assert adapter.conditioning_timestep_of(cut) == 399
    assert adapter.conditioning_timestep_of(sampling) is None
    sigmas = adapter.sigmas_of(core.StepPlan(timesteps=(999,), conditioning_timestep=399), cut)
    model = Model(cut)
    sample = adapter.sample_dmd2(model, start(cut, sigmas, eps), sigmas, disable=True)
    assert model.told == [399]
    alpha = (1 / (1 + before[399].double() ** 2)).sqrt()
    sigma = (1 - alpha**2).sqrt()
    output = network(eps, torch.full((3,), 399))
    expected = (eps - sigma * output) / alpha if kind == "epsilon" else alpha * eps - sigma * output
    # float32 conversions of numbers up to 4: a few 1e-7 of them
    torch.testing.assert_close(sample, expected.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0, (1.0, 0.5, 0.0)])
def test_sampling_is_dmd2_cores_loop_in_vp_space(adapter, core, kind, strength, eps):
    sampling = model_sampling(adapter, kind)
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    model = Model(sampling)
    sample = adapter.sample_dmd2(
        model, start(sampling, sigmas, eps), sigmas, {"seed": 7}, disable=True, strength=strength
    )
    assert model.told == [999, 749, 499, 249]
    schedule = core.VPSchedule(1 / (1 + sampling.sigmas.double() ** 2))
    prediction = "epsilon" if kind == "epsilon" else "v"
    denoiser = core.Denoiser(lambda x, t, _: network(x, t), schedule, prediction)
    expected = core.few_step_sample(
        lambda x, t: denoiser(x, t, None),
        eps,
        schedule,
        core.StepPlan.evenly(4),
        noise=core.SeededNoise(7),
        strength=strength,
    )
    # ComfyUI computes in float32; at t = 999 epsilon errors grow 14.6 times, and zero SNR's x
    # has a scale of 4518, of which float32 keeps 3e-4 (implied noise at strengths below 1).
    atol = 2e-3 if "zero" in kind else 2e-5
    torch.testing.assert_close(sample, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_noise_is_comfyuis_lcm(adapter, core, kind, eps):
    sampling = model_sampling(adapter, kind)
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    lcm = adapter.comfy.k_diffusion.sampling.sample_lcm
    expected = lcm(Model(sampling), start(sampling, sigmas, eps), sigmas, {"seed": 11}, None, True)
    sample = adapter.sample_dmd2(
        Model(sampling),
        start(sampling, sigmas, eps),
        sigmas,
        {"seed": 11},
        disable=True,
        noise_source="stock",
    )
    # The same sums, in float64 here and float32 there: one rounding of values up to 40.
    torch.testing.assert_close(sample, expected, rtol=0, atol=2e-5)


def test_fresh_noise_does_not_depend_on_the_batch(adapter, core, eps):
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    samples = [
        adapter.sample_dmd2(
            Model(sampling), start(sampling, sigmas, eps[:num]), sigmas, {"seed": 3}, disable=True
        )
        for num in (1, 3)
    ]
    torch.testing.assert_close(samples[0], samples[1][:1], rtol=0, atol=1e-6)


def test_the_noise_has_a_seed_of_its_own(adapter, eps):
    draws = [adapter.noise_for(eps, seed, "per image")(1, eps) for seed in (8, 8, 9)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    sampling = model_sampling(adapter, "epsilon")
    sigmas = sampling.sigmas[[999, 499]]
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    by_seed = adapter.sample_dmd2(Model(sampling), eps, sigmas, {"seed": 9}, disable=True)
    by_own_seed = adapter.sample_dmd2(
        Model(sampling), eps, sigmas, {"seed": 5}, disable=True, seed=9
    )
    torch.testing.assert_close(by_seed, by_own_seed, rtol=0, atol=0)


def test_a_split_schedule_stops_at_its_last_sigma(adapter, core, eps):
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    seen: list[dict[str, Any]] = []
    adapter.sample_dmd2(
        Model(sampling), eps, sigmas, {"seed": 1}, seen.append, True, strength=(1.0, 0.5, 0.2)
    )
    first_half = adapter.sample_dmd2(
        Model(sampling), eps, sigmas[:3], {"seed": 1}, None, True, strength=(1.0, 0.5)
    )
    assert torch.equal(first_half, seen[2]["x"])


def test_a_later_start_takes_the_last_of_a_recipes_strengths(adapter, core, eps):
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4, start=2), sampling)
    arguments = (eps, sigmas, {"seed": 1}, None, True)
    long = adapter.sample_dmd2(Model(sampling), *arguments, strength=(1.0, 0.5, 0.2))
    assert torch.equal(long, adapter.sample_dmd2(Model(sampling), *arguments, strength=0.2))


def test_the_callback_gets_every_step_for_previews(adapter, core, eps):
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    seen: list[dict[str, Any]] = []
    sample = adapter.sample_dmd2(Model(sampling), eps, sigmas, {"seed": 1}, seen.append, True)
    assert [step["i"] for step in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0]["x"], eps)
    assert torch.equal(seen[3]["denoised"], sample)
    assert all(step["sigma"] == sigmas[step["i"]] for step in seen)


def test_an_interrupt_passes_through(adapter, core, eps):
    class Interrupted(BaseException):
        pass

    def interrupt(step: dict[str, Any]) -> None:
        raise Interrupted

    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    with pytest.raises(Interrupted):
        adapter.sample_dmd2(Model(sampling), eps, sigmas, {}, interrupt, True)


def test_no_steps_give_the_input_back(adapter, eps):
    sampling = model_sampling(adapter, "epsilon")
    assert torch.equal(adapter.sample_dmd2(Model(sampling), eps, torch.zeros(0)), eps)


def test_other_schedules_are_refused(adapter, core, eps):
    comfy = adapter.comfy.model_sampling
    flow = type("Flow", (comfy.ModelSamplingDiscreteFlow, comfy.CONST), {})()
    plan = core.StepPlan.evenly(4)
    with pytest.raises(ValueError, match="flow-matching model"):
        adapter.sigmas_of(plan, flow)
    with pytest.raises(ValueError, match="flow-matching model"):
        adapter.sample_dmd2(Model(flow), eps, torch.tensor([1.0, 0.0]), disable=True)
    edm = type("EDM", (comfy.ModelSamplingContinuousEDM, comfy.EPS), {})()
    with pytest.raises(ValueError, match="ModelSamplingContinuousEDM"):
        adapter.sigmas_of(plan, edm)
    distilled = model_sampling(adapter, "epsilon")
    distilled.set_sigmas(distilled.sigmas[19::20])  # as ModelSamplingDiscrete "lcm" does
    with pytest.raises(ValueError, match="with 50 noise levels"):
        adapter.truncated(distilled, 30)


def test_impossible_conditioning_timesteps_are_refused(adapter, core):
    sampling = model_sampling(adapter, "epsilon")
    cut = adapter.truncated(sampling, 399)
    with pytest.raises(ValueError, match=r"timestep is 500, but the model's schedule has 0\.\.399"):
        adapter.truncated(cut, 500)
    with pytest.raises(ValueError, match="timestep 999 is beyond"):
        adapter.sigmas_of(core.StepPlan.evenly(2), cut)
    plan = core.StepPlan(timesteps=(999, 100), conditioning_timestep=399)
    assert torch.equal(adapter.sigmas_of(plan, cut)[:-1], cut.sigmas[[399, 100]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_is_recognised(adapter, kind):
    assert adapter.prediction_of(model_sampling(adapter, kind)) == kind.split()[0]


IN_BETWEEN = {"dpm_2", "dpm_fast", "dpm_adaptive", "dpmpp_sde", "dpmpp_sde_gpu", "seeds_2"} | {
    "seeds_3"
}
"""Samplers that also ask the network between two steps, as the help page says."""


@pytest.mark.filterwarnings("ignore")  # ComfyUI's own
def test_which_stock_samplers_keep_to_the_trained_timesteps(adapter, core, pack, eps):
    samplers = pack("nodes.sampler").KSAMPLER.__module__
    samplers = sys.modules[samplers]
    sampling = model_sampling(adapter, "epsilon")
    sigmas = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    leaving = set()
    for name in samplers.SAMPLER_NAMES:
        model, sampler = Model(sampling), samplers.sampler_object(name)
        arguments = ({"seed": 1, "model_options": {}}, None, True)
        noise = start(sampling, sigmas, eps)
        out = sampler.sampler_function(
            model, noise, sigmas.clone(), *arguments, **sampler.extra_options
        )
        assert out.isfinite().all(), name
        if set(model.told) != {999, 749, 499, 249}:
            leaving.add(name)
    assert leaving == IN_BETWEEN


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((999, 666, 333, 0, None), (999, 749, 499, 249, None)),
        ((799, 599, 399, 199, None), (749, 499, 249, None)),
        ((980, 500), (999, 749, 499)),  # the first of two passes
        ((500, 260, None), (499, 249, None)),  # the second
        ((999, 990), (999,)),  # a pass too short for a step
        ((12, None), (249, None)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_moved_to_the_trained_timesteps(adapter, core, kind, given, expected):
    """`None`: noise level 0."""
    sampling = model_sampling(adapter, kind)

    def levels(steps):
        return torch.stack([torch.tensor(0.0) if t is None else sampling.sigmas[t] for t in steps])

    trained = adapter.sigmas_of(core.StepPlan.evenly(4), sampling)
    assert torch.equal(adapter.moved_to(trained, levels(given), sampling), levels(expected))
    assert adapter.moved_to(trained, torch.zeros(0), sampling).numel() == 0


def test_a_recipe_is_found_where_it_is(pack, core):
    recipes = pack("nodes.recipes")

    def model(**attached):
        return SimpleNamespace(get_attachment=attached.get)

    one, other = core.Recipe(timesteps=(999,)), core.Recipe(timesteps=(999, 499))
    assert recipes.recipe_for(model(), None) is None
    assert recipes.recipe_for(SimpleNamespace(), None) is None  # a host without attachments
    metadata = other.to_metadata()
    assert recipes.recipe_for(model(lora_metadata=metadata), None) == other
    assert recipes.recipe_for(model(lora_metadata=metadata, dmd2_recipe=one), None) is one
    assert recipes.recipe_for(model(dmd2_recipe=one), other) is other
    assert recipes.recipe_for(model(lora_metadata={"ss_seed": "1"}), None) is None
    assert recipes.recipe_for(model(lora_metadata="odd", dmd2_recipe="odd"), None) is None


def test_a_cut_schedule_still_counts_as_zero_snr(adapter):
    sampling = model_sampling(adapter, "v with zero terminal SNR")
    assert adapter.has_zero_snr(sampling)
    cut = adapter.truncated(sampling, 399)
    assert adapter.has_zero_snr(cut)
    assert adapter.has_zero_snr(adapter.truncated(cut, 249))
    assert not adapter.has_zero_snr(model_sampling(adapter, "v"))
