"""DMD2 Sample in a running ComfyUI, against ComfyUI's own nodes and dmd2_core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_files
import pytest
import torch
from comfy_server import ComfyServer
from graphs import LORA
from model_files import SIZE_PX, TinyModel
from renders import ATOL, CAPTION, SEED, first_noise, sampled
from safetensors.torch import load
from setups import Setup, asked, refused
from test_sampling import area, control, hook, region
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


class Sampling(Setup):
    """A graph around DMD2 Sample."""

    def __init__(self, lora: str | None = LORA) -> None:
        super().__init__(lora=None)
        self.base = self.model
        if lora is not None:
            self.load(lora)

    def dmd2(self, **options: Any) -> list[Any]:
        inputs = {"model": self.model, "positive": self.positive, "latent_image": self.empty}
        return self.add("DMD2_Sample", **inputs | {"seed": SEED} | options)[0]

    def by_hand(self, denoise: float = 1.0, **options: Any) -> list[Any]:
        return self.sample(self.sampler(), self.sigmas(denoise=denoise), **options)


def run_all(server: ComfyServer, graph: Sampling, *made: list[Any]) -> list[tuple[Tensor, str]]:
    """Each latent (B, 4, 16, 16) in the model's own scale, and what its node says."""
    saved = [graph.add("SaveLatent", samples=link, filename_prefix="s").name for link in made]
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    files = [run.outputs[name]["latents"][0] for name in saved]
    loaded = [load(server.view(file))["latent_tensor"] * LATENT_SCALE for file in files]
    said = [run.outputs.get(link[0], {}).get("text", [""])[0] for link in made]
    return list(zip(loaded, said, strict=True))


def test_four_inputs_and_a_seed_are_the_nodes_put_together(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    [(latent, plan), (expected, _)] = run_all(server, graph, graph.dmd2(), graph.by_hand())
    assert torch.equal(latent, expected)
    assert plan == "4 steps: 999, 749, 499, 249. 4 passes of the network."


def test_a_one_step_model_needs_no_other_node(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling(model_files.ONE_STEP_LORA)
    # Four steps are not what it was trained for, but what was asked for.
    made = [graph.dmd2(), graph.dmd2(steps=4)]
    [(latent, plan), (other, other_plan)] = run_all(server, graph, *made)
    expected, _, _ = sampled(server, one_step=399, lora=model_files.ONE_STEP_LORA)
    assert torch.equal(latent, expected)
    assert plan == ("1 step: 999. The network is told 399 at the first. 1 pass of the network.")
    trained = "The LoRA was trained at 999; other timesteps are new to it."
    assert other_plan == f"4 steps: 999, 749, 499, 249. {trained} 4 passes of the network."
    assert not torch.equal(other, expected)


def test_image_to_image_and_inpainting_start_at_a_trained_step(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    image = graph.dmd2()
    masked = graph.add("SetLatentNoiseMask", samples=image, mask=graph.mask())[0]
    again = {"denoise": 0.7, "latent_image": masked}
    painted = graph.dmd2(seed=SEED + 1, **again)
    by_hand = graph.by_hand(noise_seed=SEED + 1, **again)
    varied = graph.dmd2(seed=SEED + 1, base_model=graph.base, **again)
    stays = graph.dmd2(latent_image=image, denoise=0.0)
    made = run_all(server, graph, image, painted, by_hand, varied, stays)
    [(before, _), (after, plan), (expected, _), (after_varied, _), (kept, _)] = made
    assert plan.startswith("Steps 2 to 4 of 4: 749, 499, 249. Denoise 0.7 starts at the trained")
    assert torch.equal(after, expected)
    assert torch.equal(kept, before)
    half = SIZE_PX // 16
    for latent in (after, after_varied):
        # The mask is 0 or 1 in every latent pixel; what it keeps passes through float32 scalings.
        torch.testing.assert_close(latent[..., half:], before[..., half:], rtol=0, atol=1e-5)
        assert (latent[..., :half] - before[..., :half]).abs().max() > 10 * ATOL
    assert (after - after_varied).abs().max() > 10 * ATOL


def test_a_negative_prompt_at_scale_one_is_none_bit_for_bit(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    negative = {"negative": graph.text(NEGATIVE)}
    made = [graph.dmd2(), graph.dmd2(**negative, nag_scale=1.0), graph.dmd2(**negative)]
    made.append(graph.dmd2(negative=graph.positive, nag_scale=6.0))
    [(plain, _), (off, off_plan), (on, on_plan), (same, _)] = run_all(server, graph, *made)
    assert torch.equal(plain, off)
    assert "The negative prompt does nothing: set nag_scale above 1." in off_plan
    assert "The negative prompt acts in the attention, scale 3. 4 passes" in on_plan
    assert (on - plain).abs().max() > 10 * ATOL
    # Away from itself there is nowhere to go.
    torch.testing.assert_close(same, plain, rtol=0, atol=ATOL)


@pytest.mark.parametrize("feature", [area, region, hook, control])
def test_attention_guidance_goes_with_batches_and_all_conditioning(
    server: ComfyServer, model: TinyModel, feature: Callable[[Setup], dict[str, Any]]
) -> None:
    graph = Sampling()
    positive = {"positive": feature(graph)["positive"]}
    negative = {"negative": graph.text(NEGATIVE)}
    made = [graph.dmd2(**positive, **negative, latent_image=graph.latent(batch=2))]
    made += [graph.dmd2(**positive, **negative), graph.dmd2(**positive), graph.dmd2(**negative)]
    [(two, _), (one, _), (without_nag, _), (without, _)] = run_all(server, graph, *made)
    torch.testing.assert_close(two[:1], one, rtol=0, atol=ATOL)
    for other in (without_nag, without):
        assert (one - other).abs().max() > ATOL


def test_negatives_of_any_length_are_combined_and_keep_their_range(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    long = graph.text(", ".join([NEGATIVE] * 12))  # more than one window of 77 tokens
    short = graph.text("a blue square")
    never, both = (
        graph.add(
            "ConditioningCombine",
            conditioning_1=long,
            conditioning_2=graph.add(
                "ConditioningSetTimestepRange", conditioning=short, start=start, end=1.0
            )[0],
        )[0]
        for start in (1.0, 0.0)
    )
    made = [graph.dmd2(negative=negative) for negative in (long, never, both)]
    [(alone, _), (with_never, _), (with_both, _)] = run_all(server, graph, *made)
    assert torch.equal(with_never, alone)
    assert (with_both - alone).abs().max() > ATOL


def test_guidance_on_all_steps_is_comfyuis_cfg(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    negative = {"negative": graph.text(NEGATIVE)}
    guided = graph.dmd2(**negative, guidance=2.5, guidance_steps="")
    made = run_all(server, graph, guided, graph.by_hand(**negative, cfg=2.5))
    [(latent, plan), (expected, _)] = made
    assert torch.equal(latent, expected)
    assert "Guidance 2.5 on steps 1, 2, 3, 4. 8 passes" in plan


def test_only_the_chosen_steps_take_two_passes(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    record = graph.record()
    calls = asked(server, graph, record, graph.dmd2(guidance=2.5, guidance_steps="1, 3"))
    assert calls == [[999, 2], [749, 1], [499, 2], [249, 1]]


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
    [(latent, plan)] = run_all(server, graph, graph.dmd2(guidance=2.5))
    _, student, unprompted = teacher_and_student(model)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = student(x_t, t)
        return classifier_free_guidance(x0, unprompted(x_t, t), 2.5) if t[0] == 999 else x0

    schedule, noise = model.components.schedule, SeededNoise(SEED)
    expected = few_step_sample(denoise, first_noise(), schedule, StepPlan.evenly(4), noise=noise)
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)
    assert "Guidance 2.5 on step 1. 5 passes" in plan


def test_the_base_model_makes_the_first_step(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    [(latent, plan)] = run_all(server, graph, graph.dmd2(base_model=graph.base))
    teacher, student, _ = teacher_and_student(model)
    schedule, noise = model.components.schedule, SeededNoise(SEED)
    step, rest = StepPlan(timesteps=(999, 749)), StepPlan(timesteps=(749, 499, 249))
    ddim = {"strength": 0.0, "stop": 1}
    start = few_step_sample(teacher, first_noise(), schedule, step, noise=noise, **ddim)
    expected = few_step_sample(student, start, schedule, rest, noise=noise)
    torch.testing.assert_close(latent, expected, rtol=0, atol=ATOL)
    assert "The base model makes step 1. 4 passes" in plan


def test_listed_seeds_give_what_each_gives_alone(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    two = graph.latent(batch=2)
    second = graph.add("LatentFromBatch", samples=two, batch_index=1, length=1)[0]
    made = [graph.dmd2(seeds="5, 9", latent_image=two), graph.dmd2(seed=5), graph.dmd2(seed=9)]
    made += [graph.dmd2(latent_image=two), graph.dmd2(latent_image=second)]
    listed, five, nine, batch, picked = (latent for latent, _ in run_all(server, graph, *made))
    torch.testing.assert_close(listed, torch.cat([five, nine]), rtol=0, atol=ATOL)
    torch.testing.assert_close(picked, batch[1:], rtol=0, atol=ATOL)
    assert (five - nine).abs().max() > 10 * ATOL


def test_a_model_without_a_recipe_gets_the_usual_steps_and_a_note(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling(model_files.PLAIN_LORA)
    made = [graph.dmd2(), graph.dmd2(model=graph.base)]
    [(latent, plan), (_, base_plan)] = run_all(server, graph, *made)
    assert torch.equal(latent, sampled(server)[0])
    assert plan.endswith("choose its family in DMD2 Load LoRA.")
    assert base_plan.startswith("4 steps: 999, 749, 499, 249. 4 passes")
    assert "No recipe and no LoRA" in base_plan


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        (LORA, {"seeds": "5, 9, 11"}, "seeds lists 3, but the latent holds 1 image: list one"),
        (LORA, {"seeds": "5, x"}, "seeds has 'x', which is not a whole number"),
        (LORA, {"guidance_steps": "5", "guidance": 2.0}, "guidance_steps has '5', but 4 steps run"),
        (model_files.ONE_STEP_LORA, {"denoise": 0.5}, "set denoise to 1"),
        (model_files.ONE_STEP_LORA, {"base_model": "base"}, "but there is only one"),
        (LORA, {"base_model": "model"}, "base_model carries a few-step LoRA itself"),
        (model_files.V_LORA, {}, "trained on a model with v prediction"),
    ],
)
def test_impossible_wishes_are_refused_in_one_sentence(
    server: ComfyServer, model: TinyModel, lora: str, options: dict[str, Any], message: str
) -> None:
    graph = Sampling(lora)
    if "base_model" in options:
        options = {"base_model": getattr(graph, options["base_model"])}
    run = refused(server, graph, graph.dmd2(**options))
    assert run.failed_node == "DMD2_Sample"
    assert message in run.error


def test_a_base_model_of_another_schedule_is_refused(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    widgets = {"model": graph.base, "sampling": "v_prediction", "zsnr": True}
    other = graph.add("ModelSamplingDiscrete", **widgets)[0]
    run = refused(server, graph, graph.dmd2(base_model=other))
    assert "base_model has another noise schedule than model" in run.error


def test_an_image_for_a_one_step_model_is_refused(server: ComfyServer, model: TinyModel) -> None:
    graph = Sampling()
    image = graph.dmd2()
    graph.load(model_files.ONE_STEP_LORA, model=graph.base)
    run = refused(server, graph, graph.dmd2(latent_image=image))
    assert run.failed_node == "DMD2_Sample"
    assert "the latent is not empty" in run.error
