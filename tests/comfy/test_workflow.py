"""The node pack in a running ComfyUI: the shipped workflow, and the same numbers as dmd2_core's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import graphs
import model_files
import pytest
import torch
from comfy_server import ComfyServer
from graphs import sampling_graph
from model_files import SIZE_PX, TinyModel
from renders import ATOL, CAPTION, SEED, failure, first_noise, picture, reports, sampled
from safetensors.torch import load

from dmd2_core import SeededNoise, StepPlan, few_step_sample, initial_sample
from train_lora.demo import scenes
from train_lora.demo.architecture import LATENT_SCALE
from train_lora.demo.classifier import load_classifier, recognised

NUM_NODES = 8
COMFYUI_COMPLAINTS = (
    "lora key not loaded",
    "NOT LOADED",
    "ERROR lora",
    "unet missing",
    "Traceback",
)


def test_the_shipped_workflow_makes_a_picture(server: ComfyServer, model: TinyModel) -> None:
    workflow = graphs.shipped_workflow()
    prompt = graphs.api_format(workflow, server.get("/object_info"))
    by_class = {node["class_type"]: (name, node) for name, node in prompt.items()}
    by_class["EmptyLatentImage"][1]["inputs"] |= {"width": SIZE_PX, "height": SIZE_PX}
    # Under names of their own, so that no earlier test's cached nodes take the log's lines away.
    for kind, name in (("checkpoints", graphs.CHECKPOINT), ("loras", graphs.LORA)):
        files = server.base / "models" / kind
        shutil.copy(files / name, files / f"shipped_{name}")
    by_class["CheckpointLoaderSimple"][1]["inputs"]["ckpt_name"] = f"shipped_{graphs.CHECKPOINT}"
    lora = by_class["DMD2_LoadLoRA"][1]["inputs"]["lora_name"] = f"shipped_{graphs.LORA}"
    run = server.run(prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    [file] = run.outputs[by_class["SaveImage"][0]]["images"]
    made = picture(server, file)
    assert made.shape == (3, SIZE_PX, SIZE_PX)
    assert made.std() > 0.01
    # Every key was applied, says the node, and ComfyUI has nothing to complain of.
    [report] = run.outputs[by_class["PreviewAny"][0]]["text"]
    chosen = "Chosen family DMD2, 4 steps."
    count = f"{model.num_modules} of {model.num_modules} modules applied at strength 1."
    assert report.startswith(f"{lora}: {count}\n{chosen} Recipe: steps 999, 749, 499, 249;")
    assert f"DMD2: {lora}: {count}" in run.log
    assert not [text for text in COMFYUI_COMPLAINTS if text in run.log]


def test_the_trainers_lora_paints_what_the_prompts_say(
    server: ComfyServer, model: TinyModel, demo_output: Path
) -> None:
    name = "trained.safetensors"
    shutil.copy(demo_output / "dmd2_demo_4step.safetensors", server.base / "models/loras" / name)
    chosen = scenes.random_scenes(6, torch.Generator().manual_seed(42))
    classifier, hits = load_classifier(), []
    for scene in chosen:
        _, pictures, run = sampled(server, caption=scene.caption, batch=2, lora=name)
        [report] = reports(run)
        assert f"{model.num_modules} of {model.num_modules} modules applied" in report
        hits.append(recognised(classifier, pictures * 2 - 1, scenes.labels([scene] * 2)))
    # The student's share over many pictures is 0.96 (chance: 0.25); 58 attributes scatter by 0.03.
    assert torch.cat(hits).nanmean().item() >= 0.88


def test_the_latent_is_dmd2_cores(server: ComfyServer, model: TinyModel) -> None:
    latent, _, _ = sampled(server)
    condition, denoiser = model.condition([CAPTION]), model.denoiser()
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        first_noise(),
        model.components.schedule,
        StepPlan.evenly(4),
        noise=SeededNoise(SEED),
    )
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)
    without, _, _ = sampled(server, lora=None)
    assert (latent - without).abs().max() > 10 * ATOL  # the LoRA acts


def test_other_widgets_do_what_dmd2_core_does(server: ComfyServer, model: TinyModel) -> None:
    latent, _, _ = sampled(
        server,
        scheduler={"timesteps": "999, 500, 120"},
        sampler={"strength": 0.5, "noise_seed": SEED + 7},
    )
    condition, denoiser = model.condition([CAPTION]), model.denoiser()
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        first_noise(),
        model.components.schedule,
        StepPlan(timesteps=(999, 500, 120)),
        noise=SeededNoise(SEED + 7),
        strength=0.5,
    )
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)


def test_stock_lcm_and_simple_give_the_same_picture(server: ComfyServer, model: TinyModel) -> None:
    latent, pictures, _ = sampled(server, sampler={"noise": "stock"})
    stock_latent, stock_pictures, _ = sampled(server, stock=("lcm", "simple"))
    torch.testing.assert_close(latent, stock_latent, rtol=0, atol=ATOL / 10)
    # A pixel on the border between two of the 256 levels may round either way.
    torch.testing.assert_close(pictures, stock_pictures, rtol=0, atol=1.01 / 255)
    assert (pictures != stock_pictures).float().mean() < 0.01


@pytest.mark.parametrize("stock", [None, ("euler", "simple"), ("lcm", "sgm_uniform")])
def test_one_step_at_399_is_the_formula(
    server: ComfyServer, model: TinyModel, stock: tuple[str, str] | None
) -> None:
    latent, _, _ = sampled(server, one_step=399, stock=stock, lora=model_files.ONE_STEP_LORA)
    eps, t = first_noise(), torch.tensor([399])
    alpha, sigma = (getattr(model.components.schedule, name)(t) for name in ("alpha", "sigma"))
    output = model.network(eps, t, model.condition([CAPTION]))
    torch.testing.assert_close(latent, ((eps - sigma * output) / alpha).float(), rtol=0, atol=ATOL)


def test_one_step_without_a_recipe_takes_the_widgets(server: ComfyServer, model: TinyModel) -> None:
    by_recipe, _, _ = sampled(server, one_step=399, lora=model_files.ONE_STEP_LORA)
    options = {"lora": model_files.PLAIN_LORA, "scheduler": {"steps": 1}}
    by_widgets, _, _ = sampled(server, one_step=399, **options)
    torch.testing.assert_close(by_widgets, by_recipe, rtol=0, atol=0)


def test_the_conditioning_timestep_node_leaves_a_four_step_model_alone(
    server: ComfyServer, model: TinyModel
) -> None:
    with_node, _, _ = sampled(server, one_step=399)
    torch.testing.assert_close(with_node, sampled(server)[0], rtol=0, atol=0)


def test_image_to_image_starts_at_a_trained_step(server: ComfyServer, model: TinyModel) -> None:
    graph, names = sampling_graph(caption=CAPTION, seed=SEED, size_px=SIZE_PX)
    first = graph.prompt[names["sampled"]]["inputs"]
    sigmas = graph.add("DMD2_Scheduler", model=first["model"], steps=4, timesteps="", denoise=0.5)
    image = [names["sampled"], 0]
    again = {"sigmas": sigmas[0], "latent_image": image, "noise_seed": SEED + 1}
    second = graph.add("SamplerCustom", **first | again)
    saved = graph.add("SaveLatent", samples=second[0], filename_prefix="latents/t")
    nothing = graph.add("SolidMask", value=0.0, width=SIZE_PX, height=SIZE_PX)
    masked = graph.add("SetLatentNoiseMask", samples=image, mask=nothing[0])
    kept = graph.add("SamplerCustom", **first | again | {"latent_image": masked[0]})
    saved_kept = graph.add("SaveLatent", samples=kept[0], filename_prefix="latents/t")
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    original, changed, unchanged = (
        load(server.view(run.outputs[name]["latents"][0]))["latent_tensor"] * LATENT_SCALE
        for name in (names["latent"], saved.name, saved_kept.name)
    )
    condition, denoiser = model.condition([CAPTION]), model.denoiser()
    schedule = model.components.schedule
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(SEED + 1))
    plan = StepPlan(timesteps=(499, 249))
    noised = initial_sample(schedule, StepPlan.evenly(4, start=2), noise, original)
    expected = few_step_sample(
        lambda x_t, t: denoiser(x_t, t, condition),
        noised,
        schedule,
        plan,
        noise=SeededNoise(SEED + 1),
    )
    torch.testing.assert_close(changed, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(unchanged, original, rtol=0, atol=ATOL)


def test_fresh_noise_does_not_depend_on_the_batch(server: ComfyServer, model: TinyModel) -> None:
    alone, _, _ = sampled(server)
    three, pictures, _ = sampled(server, batch=3)
    assert len(pictures) == 3
    torch.testing.assert_close(three[:1], alone, rtol=0, atol=ATOL)


def test_a_lora_without_a_recipe_gets_the_usual_four_steps(
    server: ComfyServer, model: TinyModel
) -> None:
    latent, _, run = sampled(server, lora=model_files.PLAIN_LORA)
    expected, _, _ = sampled(server)
    torch.testing.assert_close(latent, expected, rtol=0, atol=0)
    assert "The file has no recipe" in reports(run)[0]


def test_diffusers_names_are_applied_too(server: ComfyServer, model: TinyModel) -> None:
    latent, _, run = sampled(server, lora=model_files.DIFFUSERS_LORA)
    assert f"{model.num_modules} of {model.num_modules} modules applied" in reports(run)[0]
    torch.testing.assert_close(latent, sampled(server)[0], rtol=0, atol=ATOL / 10)


def test_modules_that_do_not_apply_are_reported(server: ComfyServer, model: TinyModel) -> None:
    _, _, run = sampled(server, lora=model_files.PARTIAL_LORA)
    [report] = reports(run)
    total = model.num_modules + model_files.NUM_UNKNOWN
    assert f"{model.num_modules} of {total} modules applied" in report
    assert "Not applied: 2 modules that this model lacks: lora_unet_input_blocks_90_0" in report
    assert "Not applied: 2 modules" in run.log


def test_a_lora_for_another_prediction_is_warned_of(server: ComfyServer, model: TinyModel) -> None:
    graph, names = sampling_graph(caption=CAPTION, seed=1, size_px=8, lora=model_files.V_LORA)
    loader = graph.prompt[names["report"]]["inputs"]["source"][0]
    alone = {name: graph.prompt[name] for name in ("1", loader, names["report"])}
    run = server.run(alone)
    [report] = reports(run)
    assert "trained on a model with v prediction, this one uses epsilon" in report
    assert "trained with zero terminal SNR, unlike this model" in report
    assert "trained on a model with v prediction" in run.log


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            model_files.FOREIGN_LORA,
            "none of the 2 modules, such as 'lora_unet_double_blocks_0_img_",
        ),
        (model_files.WIDE_LORA, "is made for a layer of 64 x 192, the model's is 64 x 96"),
        (model_files.DAMAGED_LORA, "the LoRA's recipe is damaged"),
    ],
)
def test_an_unfit_lora_is_refused_in_one_sentence(
    server: ComfyServer, model: TinyModel, lora: str, message: str
) -> None:
    run = failure(server, lora=lora)
    assert run.failed_node == "DMD2_LoadLoRA"
    assert message in run.error
    assert lora in run.error or "export the LoRA again" in run.error
    sampled(server)  # the server goes on


@pytest.mark.parametrize(
    ("options", "node", "message"),
    [
        ({"scheduler": {"timesteps": "499, 749"}}, "DMD2_Scheduler", "timesteps must descend"),
        ({"scheduler": {"timesteps": "1000, 500"}}, "DMD2_Scheduler", "timesteps has 1000"),
        ({"scheduler": {"timesteps": "four"}}, "DMD2_Scheduler", "which is not a whole number"),
        ({"lora": model_files.ONE_STEP_LORA}, "DMD2_Scheduler", "needs conditioning timestep 399"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(
    server: ComfyServer, model: TinyModel, options: dict[str, Any], node: str, message: str
) -> None:
    run = failure(server, **options)
    assert run.failed_node == node
    assert message in run.error
    sampled(server)


def test_a_newly_exported_lora_is_loaded_again(server: ComfyServer, model: TinyModel) -> None:
    loras = server.base / "models" / "loras"
    target = loras / "exported_twice.safetensors"
    target.write_bytes((loras / graphs.LORA).read_bytes())
    _, _, first = sampled(server, lora=target.name)
    target.write_bytes((loras / model_files.PARTIAL_LORA).read_bytes())
    _, _, second = sampled(server, lora=target.name)
    assert "Not applied" not in reports(first)[0]
    assert "Not applied" in reports(second)[0]


def test_every_tooltip_is_a_sentence(server: ComfyServer) -> None:
    info = server.get("/object_info")
    ours = [name for name in info if name.startswith("DMD2_")]
    assert len(ours) == NUM_NODES
    for name in ours:
        for kind in ("required", "optional"):
            for widget, (_, settings) in info[name]["input"].get(kind, {}).items():
                assert settings["tooltip"].endswith("."), (name, widget)
