"""Models of every kind through the trainer: predictions, full weights, warm start, exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from dmd2_core import Recipe, VPSchedule
from train_lora.export import read_lora, shared_unet_with_lora
from train_lora.export_checkpoint import export_checkpoint
from train_lora.finish import CHECKPOINT_FILE
from train_lora.models.components import Components
from train_lora.models.loading import load_components
from train_lora.models.placement import placed, release_encoders
from train_lora.models.roles import CRITIC, STUDENT, LoraSpec, SharedUNet
from train_lora.models.saving import save_single_file
from train_lora.trainer import Trainer, build_trainer

from .tiny import demo_config, random_components, random_condition, small_data, student_file
from .tiny_sd15 import random_sd15

SMALL = {
    "training__batch_size": 1,
    "student__rank": 2,
    "critic__rank": 2,
    "validation__every": 0,
}


def small_trainer(directory: Path, components: Components, **overrides: object) -> Trainer:
    config = demo_config(directory, **{k: v for k, v in (SMALL | overrides).items() if v})
    return build_trainer(config, components, small_data(), Accelerator(cpu=True))


def moved(trainer: Trainer, role: str, iteration: int = 0) -> float:
    """How far one iteration moves the role's weights."""
    before = [weight.detach().clone() for weight in trainer.distiller.unet.parameters_of(role)]
    trainer.iterate(iteration)
    after = [weight.detach() for weight in trainer.distiller.unet.parameters_of(role)]
    return sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))


# Prediction types


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v", False), ("v", True)]
)
def test_every_prediction_type_trains_from_its_file_to_its_recipe(
    tmp_path: Path, prediction: str, zero_snr: bool
) -> None:
    schedule = VPSchedule.sdxl()
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    model = replace(random_components(), prediction=prediction, schedule=schedule)
    save_single_file(model, tmp_path / "m.safetensors", dtype=torch.float32)
    loaded = load_components(tmp_path / "m.safetensors")
    trainer = small_trainer(tmp_path / "run", loaded)
    assert trainer.distiller.denoiser.prediction == prediction
    assert trainer.distiller.denoiser.schedule.has_zero_terminal_snr == zero_snr
    assert moved(trainer, STUDENT) > 0
    figures = {}
    for iteration in range(1, 4):  # several draws of t and of the step
        figures |= trainer.iterate(iteration)
    assert all(torch.isfinite(value).all() for value in figures.values())
    trainer.export(tmp_path / "lora.safetensors")
    _, recipe = read_lora(tmp_path / "lora.safetensors")
    assert recipe is not None
    assert (recipe.prediction, recipe.zero_terminal_snr) == (prediction, zero_snr)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == prediction


def test_the_first_step_of_a_zero_snr_student_is_minus_its_v(tmp_path: Path) -> None:
    """At t = 999 alpha is 0 and sigma 1: x0 = -v, whatever the noise; epsilon would divide by 0."""
    schedule = VPSchedule.sdxl().zero_terminal_snr()
    model = replace(random_components(), prediction="v", schedule=schedule)
    distiller = small_trainer(tmp_path / "run", model).distiller
    condition = random_condition(2, torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    t = torch.full((2,), 999)
    with torch.no_grad(), distiller.unet.role(STUDENT):
        assert torch.equal(distiller.denoiser(x, t, condition), -distiller.unet(x, t, condition))


# Full weights


@pytest.mark.parametrize(("student", "critic"), [("full", "lora"), ("lora", "full")])
def test_full_student_and_full_critic_train(tmp_path: Path, student: str, critic: str) -> None:
    overrides = {"student__kind": student, "critic__kind": critic}
    if critic == "full":
        overrides["critic__rank"] = None
    # The preset sets alphas, which have no effect on full weights: start from the defaults.
    trainer = full_trainer(tmp_path, overrides)
    base = {name: w.clone() for name, w in trainer.distiller.unet.unet.state_dict().items()}
    assert moved(trainer, STUDENT) > 0
    assert moved(trainer, CRITIC, 1) > 0
    after = trainer.distiller.unet.unet.state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base if "lora_" not in name)


def full_trainer(tmp_path: Path, overrides: dict, components: Components | None = None) -> Trainer:
    from train_lora.config_load import load

    path = tmp_path / "model.safetensors"
    model = components or random_components()
    if not path.exists():
        save_single_file(model, path, dtype=torch.float32)
    settings = {
        "model.path": path,
        "data.prompts": "demo",
        "data.real_images": "demo",
        "data.resolution_px": 128,
        "output.directory": tmp_path / "run",
        "training.mixed_precision": "no",
        "student.learning_rate": 1e-3,
    }
    settings |= {key.replace("__", "."): value for key, value in (SMALL | overrides).items()}
    pairs = [(key, str(value)) for key, value in settings.items() if value is not None]
    config = load(overrides=pairs).config
    model = load_components(path)  # its name is in what is exported
    return build_trainer(config, model, small_data(), Accelerator(cpu=True))


def test_a_full_student_is_exported_as_checkpoint_and_as_lora(
    tmp_path: Path, make_inputs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "train_lora")
    overrides = {"student__kind": "full", "student__rank": 96, "training__ema_decay": 0}
    trainer = full_trainer(tmp_path, overrides)
    trainer.iterate(0)
    with torch.no_grad(), trainer.distiller.unet.role(STUDENT):
        expected = trainer.distiller.unet(*make_inputs())
    trainer.export(tmp_path / "lora.safetensors")
    assert "of the student's squared change" in caplog.text
    checkpoint = load_components(tmp_path / CHECKPOINT_FILE)
    with safe_open(tmp_path / CHECKPOINT_FILE, "pt") as file:
        recipe = Recipe.from_metadata(file.metadata())
    assert recipe is not None
    assert recipe.timesteps == (999, 749, 499, 249)
    shared = SharedUNet(checkpoint.unet, {STUDENT: LoraSpec(rank=1, alpha=1)}, seed=0)
    lora, _ = shared_unet_with_lora(random_components().unet, tmp_path / "lora.safetensors")
    base, _ = lora, None
    with torch.no_grad():
        teacher = base(*make_inputs())
        close = (shared(*make_inputs()) - expected).norm()
        with lora.role(STUDENT):
            closer = (lora(*make_inputs()) - expected).norm()
    change = (expected - teacher).norm()
    assert close < 0.02 * change + 5e-3 * expected.norm()  # float16
    assert closer < 0.5 * change  # at the full rank all but biases and norms


# Warm start


def test_a_warm_start_begins_as_the_lora_and_says_what_it_inherits(
    tmp_path: Path, make_inputs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "train_lora")
    path = student_file(tmp_path / "few.safetensors")
    trainer = small_trainer(tmp_path / "run", random_components(), student__init=path)
    notice = caplog.text
    assert "CC BY-NC 4.0" in notice
    assert str(path) in notice
    lora, _ = shared_unet_with_lora(random_components().unet, path)
    unet = trainer.distiller.unet
    with torch.no_grad(), lora.role(STUDENT), unet.role(STUDENT):
        torch.testing.assert_close(unet(*make_inputs()), lora(*make_inputs()), atol=2e-5, rtol=0)
    trainer.export(tmp_path / "lora.safetensors")
    _, recipe = read_lora(tmp_path / "lora.safetensors")
    assert recipe is not None
    assert recipe.trained_with["student"]["init"] == "few.safetensors"


def test_a_cold_start_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "train_lora")
    small_trainer(tmp_path / "run", random_components())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: student_file(path, components=random_sd15()),
            r"is for another architecture: \d+ of its \d+ modules do not fit",
        ),
        (
            lambda path: student_file(path, Recipe(timesteps=(999,), prediction="v")),
            "trained for a model that predicts v, but tiny predicts epsilon",
        ),
        (lambda path: student_file(path, rank=4), "has rank 4, the student only 2"),
        (lambda path: path, "does not exist"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, make, message: str) -> None:
    path = make(tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path / "run", random_components(), student__init=path)


# Options of the passes


def test_checkpointing_covers_the_gan_passes_with_equal_gradients(tmp_path: Path) -> None:
    """Both steps with all losses; recomputation is counted where the GAN alone is at work."""
    results = []
    for recompute in ("false", "true"):
        trainer = small_trainer(
            tmp_path / recompute, random_components(), training__gradient_checkpointing=recompute
        )
        distiller = trainer.distiller
        batch, draws = trainer._batch_and_draws(0, 0)
        sample = distiller.student_sample(batch, 1, draws, with_graph=True)
        distiller.generator_step(sample, draws)
        distiller.critic_step(sample.detached(), batch, draws)
        weights = [*distiller.unet.parameters_of(STUDENT), *distiller.unet.parameters_of(CRITIC)]
        results.append([w.grad.clone() for w in (*weights, *distiller.head.parameters())])
        calls = []
        block = distiller.unet.unet.mid_block.attentions[0].transformer_blocks[0]
        hook = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with distiller.unet.role(CRITIC):
            distiller.adversary.logits(sample.x0.detach(), sample.condition, draws).sum().backward()
        hook.remove()
        assert len(calls) == (2 if recompute == "true" else 1)
    assert all(map(torch.equal, *results))


def test_bf16_autocast_trains_close_to_float32(tmp_path: Path) -> None:
    gradients = []
    for precision in ("no", "bf16"):
        trainer = small_trainer(
            tmp_path / precision, random_components(), training__mixed_precision=precision
        )
        batch, draws = trainer._batch_and_draws(0, 0)
        sample = trainer.distiller.student_sample(batch, 2, draws, with_graph=True)
        trainer.distiller.generator_step(sample, draws)
        parameters = trainer.distiller.unet.parameters_of(STUDENT)
        assert {p.grad.dtype for p in parameters} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.8  # 8 bits of mantissa, amplified at high noise; 0.89 to 0.95 seen
    assert not torch.equal(*gradients)


def test_a_network_is_moved_for_its_work_and_back_even_after_an_error() -> None:
    moves = []

    class Recorded(torch.nn.Linear):
        def to(self, device: torch.device) -> Recorded:
            moves.append(str(device))
            return self

    def work() -> None:
        moves.append("work")
        raise KeyError

    with pytest.raises(KeyError), placed(Recorded(2, 2), torch.device("cuda")):
        work()
    assert moves == ["cuda", "work", "cpu"]


@pytest.mark.parametrize("text", [True, False])
def test_text_encoders_stay_where_captions_are_encoded_during_training(text: bool) -> None:
    moved = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, device: str) -> None:
            moved.append((self.name, device))

    networks = {"vae": Recorded("vae"), "text_encoders": [Recorded("l"), Recorded("g")]}
    release_encoders(SimpleNamespace(**networks), text=text)
    texts = [("l", "cpu"), ("g", "cpu")] if text else []
    assert moved == [("vae", "cpu"), *texts]


def test_the_thumbnail_can_be_left_out_and_changes_no_number(tmp_path: Path) -> None:
    trained = []
    for wanted in ("true", "false"):
        trainer = small_trainer(tmp_path / wanted, random_components(), export__thumbnail=wanted)
        trainer.iterate(0)
        trainer.export(tmp_path / f"{wanted}.safetensors")
        trainer.iterate(1)  # as if it went on
        trained.append([w.detach() for w in trainer.critic.parameters + trainer.student.parameters])
        with safe_open(tmp_path / f"{wanted}.safetensors", "pt") as file:
            url = file.metadata().get("modelspec.thumbnail", "")
        assert url.startswith("data:image/jpeg;base64,") == (wanted == "true")
    assert all(map(torch.equal, *trained))


# From a checkpoint


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_export_of_a_checkpoint_writes_the_files_of_the_run(tmp_path: Path, kind: str) -> None:
    """Pictures included; the model comes from its file, the caption from the checkpoint."""
    trainer = full_trainer(tmp_path, {"student__kind": kind})
    trainer.iterate(0)
    trainer.iteration = 1
    trainer.save()
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    trainer.export(run / "lora.safetensors")
    written = export_checkpoint(run, out)
    assert out.read_bytes() == (run / "lora.safetensors").read_bytes()
    with safe_open(out, "pt") as file:
        recipe, url = Recipe.from_metadata(file.metadata()), file.metadata()["modelspec.thumbnail"]
    assert recipe is not None
    assert recipe.trained_with["training"]["iterations"] == 1
    assert len(url) > 1000
    if kind == "full":
        assert written == [out, tmp_path / "out_full.safetensors"]
        assert written[1].read_bytes() == (run / CHECKPOINT_FILE).read_bytes()
        out.unlink()
    with pytest.raises(ValueError, match="exists: choose another name or remove it"):
        export_checkpoint(run, out)
    trainer.export(run / "lora.safetensors")  # the run's own are replaced
