"""Models that predict flow: what they are told, and that such a teacher is distilled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dmd2_core import Recipe, SteppedSchedule, StepPlan, add_noise
from train_lora.config_load import load
from train_lora.data.training_data import TrainingData
from train_lora.demo import architecture
from train_lora.export import export_lora
from train_lora.finish import recipe_of
from train_lora.lora_metadata import usage_hint
from train_lora.merge import merge
from train_lora.model_setup import build_trainable_unet, check_same_prediction
from train_lora.models.components import Components
from train_lora.models.flow import tell_flow_time
from train_lora.models.loading import load_components
from train_lora.models.markers import resolve, statements_of_file, statements_of_scheduler
from train_lora.models.roles import STUDENT, TEACHER, LoraSpec, SharedUNet
from train_lora.models.saving import save_diffusers_folder, save_single_file
from train_lora.models.text import Condition, size_ids
from train_lora.sampling import sample_latents
from train_lora.trainer import build_trainer

from .tiny import random_components, student_file

FLOW = SteppedSchedule.flow()
SIDE = 4
"""Of the latents, in cells: 32 px."""
COLOURS = torch.tensor([[1.2, -0.8, 0.6, 1.0], [-1.0, 0.9, -1.1, -0.7]])
"""The data: each latent is one of two even colours (4 channels), with a little noise."""
SPREAD = 0.1


def condition(count: int) -> Condition:
    generator = torch.Generator().manual_seed(5)
    width = architecture.WIDTH_L + architecture.WIDTH_G
    one = torch.randn(1, 77, width, generator=generator)
    return Condition(
        hidden=one.expand(count, -1, -1).contiguous(),
        pooled=torch.zeros(count, architecture.WIDTH_G),
        time_ids=size_ids(count, 8 * SIDE, 8 * SIDE),
    )


def draw_data(count: int, generator: torch.Generator) -> Tensor:
    which = torch.randint(2, (count,), generator=generator)
    noise = torch.randn(count, 4, SIDE, SIDE, generator=generator)
    return COLOURS[which][:, :, None, None] + SPREAD * noise


def distance(latents: Tensor) -> float:
    """Root mean square distance to the nearer colour: SPREAD for the data themselves."""
    offsets = (latents[:, None] - COLOURS[None, :, :, None, None]).square().mean((2, 3, 4))
    return float(offsets.min(1).values.mean().sqrt())


def share_of_first(latents: Tensor) -> float:
    offsets = (latents[:, None] - COLOURS[None, :, :, None, None]).square().mean((2, 3, 4))
    return float((offsets.argmin(1) == 0).float().mean())


def small_flow_components(seed: int = 0) -> Components:
    """SDXL's structure with two levels and 32 channels, untrained."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            **architecture.UNET_CONFIG
            | {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (32, 32),
                "transformer_layers_per_block": (1, 1),
                "attention_head_dim": (1, 1),
            }
        )
    tell_flow_time(unet)
    return replace(random_components(), unet=unet, schedule=FLOW, prediction="flow")


@pytest.fixture(scope="module")
def flow_teacher() -> Components:
    """Trained here on the two colours: rectified flow, t ~ U{0..999}."""
    components = small_flow_components()
    unet, generator = components.unet, torch.Generator().manual_seed(1)
    rows = condition(32)
    added = {"text_embeds": rows.pooled, "time_ids": rows.time_ids}
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    for _ in range(150):
        x0 = draw_data(32, generator)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (32,), generator=generator)
        output = unet(add_noise(FLOW, x0, eps, t), t, rows.hidden, added_cond_kwargs=added).sample
        loss = (output - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unet.requires_grad_(False).eval()
    return components


# -- what the file says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "wanted", "expected"),
    [
        ({}, "flow", "flow"),
        ({"modelspec.prediction_type": "epsilon"}, "flow", "flow"),  # sd-scripts: all but v
        ({"modelspec.prediction_type": "flow"}, "auto", "flow"),
        ({}, "auto", "epsilon"),
    ],
)
def test_a_single_file_is_of_flow_where_somebody_says_so(said, wanted, expected) -> None:
    prediction, schedule = resolve(Path("m"), statements_of_file(["x"], said), wanted)
    assert prediction == expected
    assert isinstance(schedule, SteppedSchedule) == (expected == "flow")


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        ({"v_pred": ""}, "flow", r'"flow", but .* says v \(its tensor v_pred\)'),
        ({"modelspec.prediction_type": "v"}, "flow", "says v"),
        ({"modelspec.prediction_type": "flow"}, "epsilon", "says flow"),
    ],
)
def test_flow_against_what_the_file_says_is_refused(config, wanted, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Path("m"), statements_of_file(config, config), wanted)


def test_a_name_that_says_rectified_flow_asks_the_user() -> None:
    path = Path("noobai-Rectified_Flow.safetensors")
    says_epsilon = statements_of_file(["x"], {"modelspec.prediction_type": "epsilon"})
    for statements in ([], says_epsilon):
        with pytest.raises(ValueError, match="called a rectified flow model, but nothing in it"):
            resolve(path, statements, "auto")
        assert resolve(path, statements, "epsilon")[0] == "epsilon"


def test_a_folders_scheduler_says_flow_by_its_class() -> None:
    statements = statements_of_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert resolve(Path("m"), statements, "auto")[0] == "flow"
    with pytest.raises(ValueError, match=r"says flow \(_class_name in scheduler"):
        resolve(Path("m"), statements, "epsilon")


# -- what the network is told ---------------------------------------------------------------------


def test_a_loaded_flow_model_is_told_1000_times_the_flow_time(
    components, make_inputs, tmp_path
) -> None:
    save_single_file(components, tmp_path / "m.safetensors", dtype=torch.float32)
    save_diffusers_folder(components, tmp_path / "folder")
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    flow_match = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    }
    scheduler.write_text(json.dumps(flow_match))
    x_t, t, condition = make_inputs()
    as_it_is = SharedUNet(components.unet, {}, seed=0)
    for path, wanted in (("m.safetensors", "flow"), ("folder", "auto")):
        loaded = load_components(tmp_path / path, prediction=wanted)
        assert (loaded.prediction, loaded.base_hash) == ("flow", components.base_hash)
        shared = SharedUNet(loaded.unet, {STUDENT: LoraSpec(rank=1, alpha=1.0)}, seed=0)
        told = 1000 * loaded.schedule.time(t)
        with torch.no_grad():
            for role in (TEACHER, STUDENT):
                with shared.role(role):
                    assert torch.equal(shared(x_t, t, condition), as_it_is(x_t, told, condition))
                    (ours,), (theirs,) = (
                        shared.features(x_t, t, condition),
                        as_it_is.features(x_t, told, condition),
                    )
                    assert torch.equal(ours, theirs)
            assert not torch.equal(shared(x_t, t, condition), as_it_is(x_t, t, condition))


# -- what is refused ------------------------------------------------------------------------------


def test_a_flow_model_is_not_saved_as_a_checkpoint(tmp_path) -> None:
    components = small_flow_components()
    for save in (save_single_file, save_diffusers_folder):
        with pytest.raises(ValueError, match="predicts flow, which a saved checkpoint cannot say"):
            save(components, tmp_path / "m.safetensors")
    full = [("student.kind", "full"), ("model.path", "x.safetensors"), ("model.prediction", "flow")]
    config = load(preset="demo", overrides=full, ablations=["no-gan"]).config
    with pytest.raises(ValueError, match="a saved checkpoint cannot say"):
        build_trainable_unet(config, components, torch.device("cpu"), warm=False)
    assert not any(tmp_path.iterdir())


def test_a_flow_model_is_told_no_other_time(tmp_path) -> None:
    steps = [("sampling.steps", "1"), ("sampling.conditioning_timestep", "399")]
    config = load(preset="demo", overrides=steps).config
    with pytest.raises(ValueError, match="conditioning_timestep is 399, but tiny predicts flow"):
        build_trainable_unet(config, small_flow_components(), torch.device("cpu"), warm=False)


def test_loras_of_flow_and_of_epsilon_do_not_mix(components, tmp_path) -> None:
    recipe = Recipe(timesteps=(999, 749, 499, 249), prediction="flow")
    lora = student_file(tmp_path / "l.safetensors", recipe, components=components)
    with pytest.raises(ValueError, match="a model that predicts flow, but tiny predicts epsilon"):
        check_same_prediction(str(lora), recipe, random_components(), "student.init")
    base, out = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    save_single_file(random_components(), base, dtype=torch.float32)
    with pytest.raises(ValueError, match="which a merged checkpoint could not say: load the LoRA"):
        merge(base, lora, out)
    assert not out.exists()


def test_the_hint_in_the_file_names_comfyuis_own_nodes() -> None:
    even = Recipe(timesteps=(999, 749, 499, 249), prediction="flow")
    assert "sampler lcm, scheduler simple" in usage_hint(even)
    assert usage_hint(even).endswith("predicts flow (ComfyUI: ModelSamplingSD3 with shift 1)")
    shifted = Recipe(timesteps=(999, 899, 749, 499), prediction="flow")
    assert usage_hint(shifted).endswith("shift 1, sigmas 1, 0.9, 0.75, 0.5)")


# -- training -------------------------------------------------------------------------------------


def test_a_flow_teacher_is_distilled(flow_teacher: Components, tmp_path: Path) -> None:
    """One step from pure noise, where the teacher can only give the mean of what it knows."""
    settings = {
        "model.path": "flow.safetensors",
        "model.prediction": "flow",
        "output.directory": tmp_path / "run",
        "sampling.steps": 1,
        "distribution_matching.guidance": 1,
        "critic.rank": 32,
        "critic.alpha": 32,
        "critic.learning_rate": 4e-3,
        "critic.updates_per_generator": 2,
        "critic.warmup_iterations": 10,
        "student.learning_rate": 3e-3,
        "training.iterations": 45,
        "training.ema_decay": 0,
        "validation.every": 0,
    }
    pairs = [(key, str(value)) for key, value in settings.items()]
    config = load(preset="demo", overrides=pairs, ablations=["no-gan"]).config
    data = TrainingData.in_memory(captions=["a colour"] * 16, condition=condition(16))
    trainer = build_trainer(config, flow_teacher, data, Accelerator(cpu=True))

    def drawn(role: str, steps: int, strength: float) -> Tensor:
        plan, unet = StepPlan.evenly(steps), trainer.distiller.unet
        return sample_latents(
            unet, role, flow_teacher, condition(64), plan, seed=3, strength=strength
        )

    teacher_error = distance(drawn(TEACHER, 1, 1.0))
    assert distance(drawn(TEACHER, 20, 0.0)) < 0.5 * teacher_error  # it has learnt the colours
    assert distance(drawn(STUDENT, 1, 1.0)) == pytest.approx(teacher_error, rel=1e-4)
    for iteration in range(config.training.iterations):
        trainer.iterate(iteration)
    after = drawn(STUDENT, 1, 1.0)
    assert distance(after) < 0.8 * teacher_error
    assert 0.1 < share_of_first(after) < 0.9  # not one of the two colours alone

    recipe = recipe_of(config, flow_teacher, 45)
    assert (recipe.prediction, recipe.zero_terminal_snr) == ("flow", False)
    export_lora(trainer.distiller.unet, STUDENT, tmp_path / "l.safetensors", recipe)
