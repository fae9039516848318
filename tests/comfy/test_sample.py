"""DMD2 Sample in a running ComfyUI, against ComfyUI's own nodes and dmd2_core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_files
import pytest
import torch
from comfy_server import ComfyServer, Run
from graphs import CHECKPOINT, LORA, Graph
from model_files import SIZE_PX, TinyModel
from safetensors.torch import load
from renders import ATOL, CAPTION, SEED, first_noise, sampled
from torch import Tensor

from dmd2_core import (
    Denoiser,
    SeededNoise,
    StepPlan,
    classifier_free_guidance,
    few_step_sample,
)
from train_lora.demo.architecture import LATENT_SCALE
from train_lora.models.roles import TEACHER

NEGATIVE = "a large green star on a dotted brown background"
FROM_FILE = {"strength": 1.0, "family": "from the file"}


class Sampling(Graph):
    """A graph with DMD2 Sample; further nodes can be added before it is run."""

    def __init__(self, lora: str | None = LORA, batch: int = 1) -> None:
        super().__init__()
        self.checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.model = self.checkpoint[0] if lora is None else self.with_lora(lora)
        self.positive, self.negative = self.text(CAPTION), self.text(NEGATIVE)
        self.latent = self.empty(batch)

    def with_lora(self, name: str) -> list[Any]:
        return self.add("DMD2_LoadLoRA", model=self.checkpoint[0], lora_name=name, **FROM_FILE)[0]

    def text(self, text: str) -> list[Any]:
        return self.add("CLIPTextEncode", clip=self.checkpoint[1], text=text)[0]

    def empty(self, batch: int) -> list[Any]:
        return self.add("EmptyLatentImage", width=SIZE_PX, height=SIZE_PX, batch_size=batch)[0]

    def sample(self, **options: Any) -> list[Any]:
        inputs = {"model": self.model, "positive": self.positive, "latent_image": self.latent}
        return self.add("DMD2_Sample", **inputs | {"seed": SEED} | options)[0]

    def custom(self, sigmas: list[Any], **options: Any) -> list[Any]:
        """ComfyUI's own sampling node, with the pack's sampler."""
        widgets = {"strength": 1.0, "strengths": "", "noise_seed": -1, "noise": "per image"}
        inputs = {"model": self.model, "positive": self.positive, "negative": self.negative}
        inputs |= {"cfg": 1.0, "add_noise": True, "noise_seed": SEED, "latent_image": self.latent}
        inputs |= {"sampler": self.add("DMD2_Sampler", **widgets)[0], "sigmas": sigmas}
        return self.add("SamplerCustom", **inputs | options)[0]

    def sigmas(self, **options: Any) -> list[Any]:
        widgets = {"steps": 0, "timesteps": "", "denoise": 1.0}
        return self.add("DMD2_Scheduler", model=self.model, **widgets | options)[0]


def run_all(server: ComfyServer, graph: Graph, *latents: list[Any]) -> tuple[list[Tensor], Run]:
    """Each latent (B, 4, 16, 16) in the model's own scale."""
    names = [
        graph.add("SaveLatent", samples=latent, filename_prefix="latents/s").name
        for latent in latents
    ]
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    files = [run.outputs[name]["latents"][0] for name in names]
    return [load(server.view(file))["latent_tensor"] * LATENT_SCALE for file in files], run


def plan(run: Run, latent: list[Any]) -> str:
    """What the node that made this latent says below itself."""
    [text] = run.outputs[latent[0]]["text"]
    return text


def test_four_inputs_and_a_seed_are_the_nodes_put_together(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    [latent], run = run_all(server, graph, made := graph.sample())
    expected, _, _ = sampled(server)
    assert torch.equal(latent, expected)
    assert plan(run, made) == "4 steps: 999, 749, 499, 249. 4 passes of the network."


def test_a_one_step_model_needs_no_other_node(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling(lora=model_files.ONE_STEP_LORA)
    four = {"steps": 4}  # not what it was trained for, but what was asked for
    [latent, other], run = run_all(server, graph, made := graph.sample(), graph.sample(**four))
    expected, _, _ = sampled(server, one_step=399, lora=model_files.ONE_STEP_LORA)
    assert torch.equal(latent, expected)
    assert "The network is told 399 at the first. 1 pass of" in plan(run, made)
    assert not torch.equal(other, expected)


def test_image_to_image_and_inpainting_snap_to_a_trained_step(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    image = graph.sample()
    mask = graph.add("SolidMask", value=0.0, width=SIZE_PX, height=SIZE_PX)
    hole = graph.add("SolidMask", value=1.0, width=SIZE_PX // 2, height=SIZE_PX)
    places = {"x": 0, "y": 0, "operation": "add"}
    mask = graph.add("MaskComposite", destination=mask[0], source=hole[0], **places)
    masked = graph.add("SetLatentNoiseMask", samples=image, mask=mask[0])[0]
    again = {"denoise": 0.7, "seed": SEED + 1}
    changed = graph.sample(latent_image=image, **again)
    painted = graph.sample(latent_image=masked, **again)
    painted_more = graph.sample(latent_image=masked, base_model=graph.checkpoint[0], **again)
    by_hand = graph.custom(graph.sigmas(denoise=0.7), latent_image=masked, noise_seed=again["seed"])
    all_of_it = graph.sample(latent_image=image, denoise=0.0)
    latents, run = run_all(server, graph, image, changed, painted, by_hand, painted_more, all_of_it)
    before, changed_latent, after, expected, after_more, kept = latents
    assert plan(run, changed).startswith("Steps 2 to 4 of 4: 749, 499, 249. Denoise 0.7 starts at")
    assert torch.equal(after, expected)
    assert torch.equal(kept, before)
    half = SIZE_PX // 16
    for latent in (after, after_more):
        # ComfyUI blends the mask's border over no latent pixel: it is 0 or 1 in each.
        torch.testing.assert_close(latent[..., half:], before[..., half:], rtol=0, atol=1e-5)
        assert (latent[..., :half] - before[..., :half]).abs().max() > 10 * ATOL
    assert not torch.equal(after, changed_latent)
    assert not torch.equal(after, after_more)


def test_a_negative_prompt_at_scale_one_is_none_bit_for_bit(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    negative = {"negative": graph.negative}
    links = [graph.sample(), graph.sample(**negative, nag_scale=1.0), graph.sample(**negative)]
    links.append(graph.sample(negative=graph.positive, nag_scale=6.0))
    [plain, off, on, same], run = run_all(server, graph, *links)
    assert torch.equal(plain, off)
    assert "The negative prompt does nothing" in plan(run, links[1])
    assert "acts in the attention, scale 3. 4 passes" in plan(run, links[2])
    assert (on - plain).abs().max() > 10 * ATOL
    # Away from itself there is nowhere to go.
    torch.testing.assert_close(same, plain, rtol=0, atol=ATOL)


def test_attention_guidance_goes_with_batches_areas_and_long_texts(
    server: ComfyServer, model: TinyModel
) -> None:
    graph, alone = Sampling(batch=2), {}
    area = {"width": SIZE_PX // 2, "height": SIZE_PX, "x": 0, "y": 0, "strength": 1.0}
    left = graph.add("ConditioningSetArea", conditioning=graph.text("a red ring"), **area)[0]
    both = {"conditioning_1": graph.positive, "conditioning_2": left}
    positive = graph.add("ConditioningCombine", **both)[0]
    long = {"negative": graph.text(", ".join([NEGATIVE] * 12))}  # more than one window of tokens
    later = graph.add(
        "ConditioningSetTimestepRange", conditioning=graph.negative, start=0.5, end=1.0
    )[0]
    parts = {"conditioning_1": long["negative"], "conditioning_2": later}
    combined = {"negative": graph.add("ConditioningCombine", **parts)[0]}
    alone = {"latent_image": graph.empty(1)}
    links = [graph.sample(positive=positive, **combined)]
    links.append(graph.sample(positive=positive, **combined, **alone))
    links.append(graph.sample(positive=positive, **long))
    links.append(graph.sample(positive=positive))
    [two, one, without_later, plain], _ = run_all(server, graph, *links)
    torch.testing.assert_close(two[:1], one, rtol=0, atol=ATOL)
    differences = [(two - other).abs().max() for other in (without_later, plain)]
    assert min(differences) > ATOL


def test_guidance_on_all_steps_is_comfyuis_cfg(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    guided = {"negative": graph.negative, "guidance": 2.5, "guidance_steps": ""}
    links = [graph.sample(**guided), graph.custom(graph.sigmas(), cfg=2.5)]
    [latent, expected], run = run_all(server, graph, *links)
    assert torch.equal(latent, expected)
    assert "Guidance 2.5 on steps 1, 2, 3, 4. 8 passes" in plan(run, links[0])


Denoise = Callable[[Tensor, Tensor], Tensor]


def teacher_and_student(model: TinyModel) -> tuple[Denoise, Denoise, Denoise]:
    """x0 by the teacher, by the student, and by the student without a prompt."""
    condition, parts = model.condition([CAPTION]), model.components
    nothing, student = parts.unconditional(condition), model.denoiser()

    @torch.no_grad()
    def network(x_t: Tensor, t: Tensor, given: Any) -> Tensor:
        with model.student.role(TEACHER):
            return model.student(x_t, t, given)

    teacher = Denoiser(network, parts.schedule, parts.prediction)
    return (
        lambda x_t, t: teacher(x_t, t, condition),
        lambda x_t, t: student(x_t, t, condition),
        lambda x_t, t: student(x_t, t, nothing),
    )


def test_guidance_on_the_first_step_is_dmd2_cores(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    [latent], run = run_all(server, graph, made := graph.sample(guidance=2.5))
    _, student, unprompted = teacher_and_student(model)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = student(x_t, t)
        return classifier_free_guidance(x0, unprompted(x_t, t), 2.5) if t[0] == 999 else x0

    expected = few_step_sample(
        denoise,
        first_noise(),
        model.components.schedule,
        StepPlan.evenly(4),
        noise=SeededNoise(SEED),
    )
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)
    assert "Guidance 2.5 on step 1. 5 passes" in plan(run, made)


def test_the_base_model_makes_the_first_step(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    base = {"base_model": graph.checkpoint[0], "base_steps": 2}
    [latent], run = run_all(server, graph, made := graph.sample(**base))
    teacher, student, _ = teacher_and_student(model)
    schedule, none = model.components.schedule, SeededNoise(0)
    ways = StepPlan(timesteps=(999, 874, 749))
    start = few_step_sample(
        teacher, first_noise(), schedule, ways, noise=none, strength=0.0, stop=2
    )
    rest = StepPlan(timesteps=(749, 499, 249))
    expected = few_step_sample(student, start, schedule, rest, noise=SeededNoise(SEED))
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)
    assert "The base model makes step 1, in 2 steps. 5 passes" in plan(run, made)


def test_listed_seeds_give_what_each_gives_alone(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling(batch=2)
    one = {"latent_image": graph.empty(1)}
    links = [graph.sample(seeds="5, 9"), graph.sample(seed=5, **one), graph.sample(seed=9, **one)]
    second = graph.add("LatentFromBatch", samples=graph.latent, batch_index=1, length=1)[0]
    links += [graph.sample(), graph.sample(latent_image=second)]
    [listed, five, nine, batch, picked], _ = run_all(server, graph, *links)
    torch.testing.assert_close(listed, torch.cat([five, nine]), rtol=0, atol=ATOL)
    torch.testing.assert_close(picked, batch[1:], rtol=0, atol=ATOL)
    assert (five - nine).abs().max() > 10 * ATOL


def test_a_model_without_a_recipe_gets_the_usual_steps_and_a_note(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling(lora=model_files.PLAIN_LORA)
    links = [graph.sample(), graph.sample(model=graph.checkpoint[0])]
    [latent, _], run = run_all(server, graph, *links)
    assert torch.equal(latent, sampled(server)[0])
    assert "No recipe: these are DMD2's usual steps." in plan(run, links[0])
    assert "No recipe and no LoRA" in plan(run, links[1])


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        (LORA, {"seeds": "5, 9, 11"}, "seeds lists 3, but the latent holds 1 image: list one"),
        (LORA, {"seeds": "5, x"}, "seeds has 'x', which is not a whole number"),
        (LORA, {"guidance_steps": "5", "guidance": 2.0}, "guidance_steps has '5', but 4 steps run"),
        (model_files.ONE_STEP_LORA, {"denoise": 0.5}, "set denoise to 1"),
        (model_files.ONE_STEP_LORA, {"base_model": None}, "but there is only one"),
        (LORA, {"base_model": "itself"}, "base_model carries a few-step LoRA itself"),
        (model_files.V_LORA, {}, "trained on a model with v prediction"),
    ],
)
def test_impossible_wishes_are_refused_in_one_sentence(
    server: ComfyServer, model: TinyModel, lora: str, options: dict[str, Any], message: str
) -> None:
    graph = Sampling(lora=lora)
    if "base_model" in options:
        is_same = options["base_model"] is not None
        options = {"base_model": graph.model if is_same else graph.checkpoint[0]}
    graph.add("SaveLatent", samples=graph.sample(**options), filename_prefix="latents/s")
    run = server.run(graph.prompt)
    assert run.failed_node == "DMD2_Sample"
    assert message in run.error


def test_an_image_for_a_one_step_model_is_refused(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    image = graph.sample()
    one_step = graph.with_lora(model_files.ONE_STEP_LORA)
    again = graph.sample(model=one_step, latent_image=image)
    graph.add("SaveLatent", samples=again, filename_prefix="latents/s")
    run = server.run(graph.prompt)
    assert run.failed_node == "DMD2_Sample"
    assert "the latent is not empty" in run.error
