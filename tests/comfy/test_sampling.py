"""Our nodes together with the rest of ComfyUI, in a running one: what people do besides a prompt.

What ComfyUI adds around a sampler (masks, areas, hooks, ControlNet) must act on ours exactly as on
its own `lcm`, which with the same noise makes the same picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import graphs
import model_files
import pytest
import torch
from comfy_server import ComfyServer
from model_files import SIZE_PX, TinyModel
from renders import ATOL, CAPTION, SEED, first_noise
from safetensors.torch import load
from setups import Setup, asked, latents, refused

from dmd2_core import Denoiser, SeededNoise, StepPlan, few_step_sample
from train_lora.demo.architecture import LATENT_SCALE

TRAINED = [999, 749, 499, 249]
STOCK_NOISE = {"noise": "stock"}


def area(setup: Setup) -> dict[str, Any]:
    other = setup.text("a large blue square on a plain yellow background")
    place = {"width": SIZE_PX // 2, "height": SIZE_PX, "x": 0, "y": 0, "strength": 1.0}
    here = setup.add("ConditioningSetArea", conditioning=other, **place)
    both = setup.add("ConditioningCombine", conditioning_1=setup.positive, conditioning_2=here[0])
    return {"positive": both[0]}


def region(setup: Setup) -> dict[str, Any]:
    other = setup.text("a large blue square on a plain yellow background")
    where = {"mask": setup.mask(), "strength": 1.0, "set_cond_area": "default"}
    here = setup.add("ConditioningSetMask", conditioning=other, **where)
    both = setup.add("ConditioningCombine", conditioning_1=setup.positive, conditioning_2=here[0])
    return {"positive": both[0]}


def hook(setup: Setup) -> dict[str, Any]:
    strengths = {"strength_model": 0.5, "strength_clip": 0.0}
    lora = setup.add("CreateHookLora", lora_name=model_files.PLAIN_LORA, **strengths)
    where = {"strength": 1.0, "set_cond_area": "default", "hooks": lora[0]}
    return {"positive": setup.add("ConditioningSetProperties", cond_NEW=setup.positive, **where)[0]}


def control(setup: Setup) -> dict[str, Any]:
    net = setup.add("ControlNetLoader", control_net_name=model_files.CONTROLNET)
    size = {"width": SIZE_PX, "height": SIZE_PX, "batch_size": 1}
    picture = setup.add("EmptyImage", color=0x3060C0, **size)
    how = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "image": picture[0]}
    conds = {"positive": setup.positive, "negative": setup.negative}
    applied = setup.add("ControlNetApplyAdvanced", control_net=net[0], **conds, **how)
    return {"positive": applied[0], "negative": applied[1]}


@pytest.mark.parametrize("feature", [area, region, hook, control])
def test_conditioning_acts_as_on_comfyuis_own_sampler(
    server: ComfyServer, model: TinyModel, feature: Callable[[Setup], dict[str, Any]]
) -> None:
    graph = Setup()
    sigmas, changed = graph.sigmas(), feature(graph)
    ours = graph.sample(graph.sampler(**STOCK_NOISE), sigmas, **changed)
    theirs = graph.sample(graph.lcm(), sigmas, **changed)
    plain = graph.sample(graph.sampler(**STOCK_NOISE), sigmas)
    ours, theirs, plain = latents(server, graph, ours, theirs, plain)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL / 10)
    assert (ours - plain).abs().max() > 0.05  # it does something at all


def test_inpainting_changes_what_the_mask_says_and_nothing_else(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Setup()
    first = graph.sample(graph.sampler(), graph.sigmas())
    masked = graph.add("SetLatentNoiseMask", samples=first, mask=graph.mask())
    again = {"latent_image": masked[0], "noise_seed": SEED + 1, "positive": graph.text("a ring")}
    sigmas = graph.sigmas(denoise=0.7)
    ours = graph.sample(graph.sampler(**STOCK_NOISE), sigmas, **again)
    theirs = graph.sample(graph.lcm(), sigmas, **again)
    first, ours, theirs = latents(server, graph, first, ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL / 10)
    half = ours.shape[-1] // 2
    torch.testing.assert_close(ours[..., half:], first[..., half:], rtol=0, atol=1e-5)
    assert (ours - first)[..., :half].abs().mean() > 0.05


def test_a_batch_has_each_images_own_noise(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    sigmas, sampler = graph.sigmas(), graph.sampler()
    four = graph.sample(sampler, sigmas, latent_image=graph.latent(batch=4))
    two = graph.sample(sampler, sigmas, latent_image=graph.latent(batch=2))
    four, two = latents(server, graph, four, two)
    torch.testing.assert_close(four[:2], two, rtol=0, atol=ATOL / 10)
    assert len({tuple(image.flatten().tolist()) for image in four}) == 4


def test_strengths_and_noise_seed_are_dmd2_cores(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    made = graph.sample(graph.sampler(strengths="1, 0.5, 0", noise_seed=77), graph.sigmas())
    [latent] = latents(server, graph, made)
    condition, denoiser = model.condition([CAPTION]), model.denoiser()
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        first_noise(),
        model.components.schedule,
        StepPlan.evenly(4),
        noise=SeededNoise(77),
        strength=(1.0, 0.5, 0.0),
    )
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)


def test_too_few_strengths_are_said(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    run = refused(server, graph, graph.sample(graph.sampler(strengths="1, 0"), graph.sigmas()))
    assert "strength has 2 values for 3 re-injections" in run.error


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_is_dmd2_cores(server: ComfyServer, model: TinyModel, zero_snr: bool) -> None:
    """The tiny network read as a v-predicting one: nonsense, but the same on both sides."""
    graph = Setup(lora=None)
    options = {"sampling": "v_prediction", "zsnr": zero_snr}
    graph.model = graph.add("ModelSamplingDiscrete", model=graph.model, **options)[0]
    lora = model_files.V_LORA if zero_snr else model_files.PLAIN_LORA
    loaded = graph.load(lora)
    graph.add("PreviewAny", source=loaded[3])
    timesteps = (999, 499) if zero_snr else (999, 749, 499, 249)
    four = graph.sample(graph.sampler(), graph.sigmas())
    one_step = graph.add("DMD2_ConditioningTimestep", model=graph.model, timestep=400)
    graph.model = one_step[0]
    one = graph.sample(graph.sampler(), graph.sigmas(steps=1))
    four, one = latents(server, graph, four, one)
    schedule = model.components.schedule
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    condition, denoiser = model.condition([CAPTION]), Denoiser(model.network, schedule, "v")
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        first_noise(),
        schedule,
        StepPlan(timesteps=timesteps),
        noise=SeededNoise(SEED),
    )
    # At zero SNR ComfyUI keeps alpha_999 = 2.2e-4 and a start of scale 4518 in float32.
    torch.testing.assert_close(four, expected, rtol=0, atol=2 * ATOL)
    expected = denoiser(first_noise(), torch.tensor([400]), condition)
    torch.testing.assert_close(one, expected, rtol=0, atol=ATOL)


def test_a_recipe_that_contradicts_the_model_is_refused(
    server: ComfyServer, model: TinyModel
) -> None:
    for node, use in (
        ("DMD2_Scheduler", lambda graph: graph.sample(graph.lcm(), graph.sigmas())),
        ("DMD2_KSamplerPatch", lambda graph: patched(graph).ksampler()),
    ):
        graph = Setup(model_files.V_LORA)
        run = refused(server, graph, use(graph))
        assert run.failed_node == node
        assert "trained on a model with v prediction, this one uses epsilon" in run.error


def patched(graph: Setup, **widgets: Any) -> Setup:
    patch = graph.add("DMD2_KSamplerPatch", **{"model": graph.model, "steps": 0} | widgets)
    graph.model = patch[0]
    return graph


@pytest.mark.parametrize("sampling", ["ours", "lcm", "KSampler"])
def test_a_filled_latent_is_refused_by_a_one_step_model(
    server: ComfyServer, model: TinyModel, sampling: str
) -> None:
    graph = Setup()
    picture = graph.sample(graph.sampler(), graph.sigmas())
    again = {"latent_image": picture}
    graph.load(model_files.ONE_STEP_LORA)
    if sampling == "KSampler":
        made = patched(graph).ksampler(**again)
    else:
        told = graph.add("DMD2_ConditioningTimestep", model=graph.model, timestep=399)
        graph.model = told[0]
        sampler = graph.sampler() if sampling == "ours" else graph.lcm()
        made = graph.sample(sampler, graph.sigmas(), **again)
    run = refused(server, graph, made)
    assert "the latent is not empty" in run.error
    assert "connect an Empty Latent Image" in run.error


@pytest.mark.parametrize(
    ("settings", "timesteps"),
    [
        ({}, TRAINED),
        ({"cfg": 7.5}, TRAINED),
        ({"scheduler": "karras", "steps": 20, "cfg": 7.5}, TRAINED),
        ({"scheduler": "normal", "sampler_name": "euler"}, TRAINED),
        ({"sampler_name": "dpmpp_2m", "scheduler": "beta", "steps": 8}, TRAINED),
        ({"denoise": 0.75}, [749, 499, 249]),
        ({"denoise": 0.6, "steps": 12}, [499, 249]),
        ({"denoise": 0.2}, [249]),
    ],
)
def test_ksampler_asks_trained_timesteps_only(
    server: ComfyServer, model: TinyModel, settings: dict[str, Any], timesteps: list[int]
) -> None:
    graph = patched(Setup())
    if "denoise" in settings:
        settings = settings | {"latent_image": graph.ksampler()}
    record = graph.record()
    calls = asked(server, graph, record, graph.ksampler(**settings))
    assert calls == [[t, 1] for t in timesteps]  # one row: no pass for the negative prompt


def test_without_the_patch_ksampler_asks_others(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    record = graph.record()
    calls = asked(server, graph, record, graph.ksampler(scheduler="normal", cfg=2.0))
    assert [call[0] for call in calls] == [999, 666, 333, 0]
    assert calls[0][1] == 2


def test_the_patched_ksampler_is_our_sampler(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    ours = graph.sample(graph.sampler(**STOCK_NOISE), graph.sigmas())
    theirs = patched(graph).ksampler(cfg=3.0, scheduler="karras", steps=11)
    ours, theirs = latents(server, graph, ours, theirs)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=ATOL / 10)


def test_two_passes_of_ksampler_advanced_meet_at_a_trained_timestep(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = patched(Setup())
    record = graph.record()
    common = {"model": graph.model, "positive": graph.positive, "negative": graph.negative}
    common |= {"noise_seed": SEED, "steps": 20, "cfg": 1.0, "sampler_name": "euler"}
    common |= {"scheduler": "simple"}
    first = graph.add(
        "KSamplerAdvanced",
        **common | {"latent_image": graph.empty, "add_noise": "enable", "start_at_step": 0},
        **{"end_at_step": 10, "return_with_leftover_noise": "enable"},
    )
    second = graph.add(
        "KSamplerAdvanced",
        **common | {"latent_image": first[0], "add_noise": "disable", "start_at_step": 10},
        **{"end_at_step": 10000, "return_with_leftover_noise": "disable"},
    )
    assert asked(server, graph, record, second[0]) == [[t, 1] for t in TRAINED]


def test_a_one_step_model_needs_no_other_node_with_ksampler(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = patched(Setup(model_files.ONE_STEP_LORA))
    record = graph.record()
    made = graph.ksampler(sampler_name="euler", cfg=4.0)
    node = graph.add("TestRecorded", latent=made, record=record)
    saved = graph.add("SaveLatent", samples=made, filename_prefix="latents/t")
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    assert json.loads(run.outputs[node.name]["calls"][0]) == [[399, 1]]
    file = run.outputs[saved.name]["latents"][0]
    latent = load(server.view(file))["latent_tensor"] * LATENT_SCALE
    expected = model.denoiser()(first_noise(), torch.tensor([399]), model.condition([CAPTION]))
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)


def test_the_model_carries_its_recipe_without_a_connection(
    server: ComfyServer, model: TinyModel
) -> None:
    """Ours by an attachment of its own, ComfyUI's loader by the file's metadata."""
    graph = Setup(model_files.OTHER_STEPS_LORA)
    made = [graph.sample(graph.sampler(), graph.sigmas())]
    graph.model = graph.add("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)[0]
    stock = {"lora_name": model_files.OTHER_STEPS_LORA, "strength_model": 1.0}
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, **stock)[0]
    made.append(graph.sample(graph.sampler(), graph.sigmas()))
    ours, theirs = latents(server, graph, *made)
    condition, denoiser = model.condition([CAPTION]), model.denoiser()
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        first_noise(),
        model.components.schedule,
        StepPlan(timesteps=(999, 620, 180)),
        noise=SeededNoise(SEED),
        strength=(0.8, 0.3),
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=ATOL / 10)


def test_a_style_lora_on_top_leaves_the_recipe(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup(model_files.OTHER_STEPS_LORA)
    style = graph.load(model_files.PLAIN_LORA, strength=0.2)
    shown = graph.add("PreviewAny", source=style[3])
    record = graph.record()
    calls = graph.add(
        "TestRecorded", latent=graph.ksampler(model=patched(graph).model), record=record
    )
    run = server.run(graph.prompt)
    assert run.error is None, run.error
    assert [call[0] for call in json.loads(run.outputs[calls.name]["calls"][0])] == [999, 620, 180]
    assert "carries a few-step LoRA" not in run.outputs[shown.name]["text"][0]


def test_two_few_step_loras_are_warned_of(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup(model_files.OTHER_STEPS_LORA)
    shown = graph.add("PreviewAny", source=graph.load(model_files.PLAIN_LORA, "LCM, 4 steps")[3])
    run = server.run(graph.prompt)
    assert "carries a few-step LoRA already" in run.outputs[shown.name]["text"][0]


def test_a_family_against_the_files_own_recipe_is_said(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Setup(lora=None)
    loaded = graph.load(model_files.OTHER_STEPS_LORA, "LCM, 4 steps")
    shown = graph.add("PreviewAny", source=loaded[3])
    [report] = server.run(graph.prompt).outputs[shown.name]["text"]
    assert "Chosen family LCM, 4 steps. Recipe: steps 999, 759, 499, 259;" in report
    assert 'set family to "from the file". Its own: Recipe: steps' in report


def test_a_family_sets_steps_and_noise(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup(model_files.PLAIN_LORA, "SDXL-Lightning, 2 steps")
    shown = graph.add("DMD2_Scheduler", model=graph.model, steps=0, timesteps="", denoise=1.0)
    one = graph.sample(graph.sampler(noise_seed=1), shown[0])
    two = graph.sample(graph.sampler(noise_seed=2), shown[0])
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    stock = graph.sample(euler[0], shown[0])
    plan = graph.add("PreviewAny", source=shown[1])
    one, two, stock = latents(server, graph, one, two, stock)
    assert torch.equal(one, two)  # no fresh noise
    torch.testing.assert_close(one, stock, rtol=0, atol=ATOL / 10)
    new = graph.add("DMD2_Scheduler", model=graph.model, steps=0, timesteps="", denoise=0.4)
    graph.add("PreviewAny", source=new[1])
    run = server.run(graph.prompt)
    assert run.outputs[plan.name]["text"] == ["2 steps: 999, 499."]
    said = "Step 2 of 2: 499. Denoise 0.4 starts at the trained timestep 499 (0.5)."
    assert run.outputs[new.name]["text"] == [said]  # the node itself shows it


def test_an_interrupt_leaves_the_server_usable(server: ComfyServer, model: TinyModel) -> None:
    graph = Setup()
    long = graph.sample(graph.sampler(), graph.sigmas(steps=16), latent_image=graph.latent(64))
    graph.add("SaveLatent", samples=long, filename_prefix="latents/t")
    before = len(server.log())
    job = server.post("/prompt", {"prompt": graph.prompt})["prompt_id"]
    deadline = time.monotonic() + 60
    while "/16" not in server.log()[before:]:  # the progress bar in the log: it is sampling
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.post("/interrupt", {})
    while (entry := server.get(f"/history/{job}").get(job)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert "16/16" not in server.log()[before:]
    after = Setup()
    latents(server, after, after.sample(after.sampler(), after.sigmas()))
