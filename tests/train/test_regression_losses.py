"""`regression.loss`: its values and gradients, its networks' files, and that each trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from torch import Tensor

from train_lora import prepare
from train_lora.checkpoint import check_config, read_state, restore
from train_lora.config import Config
from train_lora.data.demo_data import demo_captions
from train_lora.data.training_data import TrainingData, load_training_data
from train_lora.demo.teacher import load_teacher
from train_lora.loop import Trainer
from train_lora.metrics.latent_lpips import load_latent_lpips
from train_lora.metrics.lpips import load_lpips
from train_lora.models.components import Components
from train_lora.regression_losses import PerceptualLoss, regression_loss_of, squared_error
from train_lora.trainer import build_trainer

from .metric_files import alexnet_file, latent_lpips_file, tiny_vae_folder
from .test_regression import STAGES, random_pairs
from .tiny import demo_config, random_components, small_data

CPU = torch.device("cpu")
LOSSES = ("lpips", "lpips tiny", "latent-lpips")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The networks of all losses."""
    folder = tmp_path_factory.mktemp("networks")
    alexnet_file(folder)
    latent_lpips_file(folder)
    tiny_vae_folder(folder / "tiny")
    return folder


@pytest.fixture
def settings(files: Path) -> Callable[[str], dict[str, Any]]:
    """Of [regression], for one of `LOSSES`."""
    pixels = {"regression__loss": "lpips", "regression__lpips_weights": files / "alexnet.pth"}
    of = {
        "lpips": pixels,
        "lpips tiny": pixels | {"regression__tiny_vae": files / "tiny"},
        "latent-lpips": {
            "regression__loss": "latent-lpips",
            "regression__lpips_weights": files / "sdxl_latest_vgg16_tuned.pth",
        },
    }
    return of.__getitem__


@pytest.fixture
def loss_of(
    settings: Callable[[str], dict[str, Any]], tmp_path: Path, shared_components: Components
) -> Callable[[str], PerceptualLoss]:
    def make(name: str) -> PerceptualLoss:
        config = demo_config(tmp_path / "run", **STAGES | settings(name))
        found = regression_loss_of(config, shared_components, CPU)
        assert isinstance(found, PerceptualLoss)
        return found

    return make


def latents(rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(rows, 4, 16, 16, generator=generator)
    return x0, x0 + 0.7 * torch.randn(rows, 4, 16, 16, generator=generator)


# -- values and gradients --------------------------------------------------------------------------


def test_the_squared_error_is_as_one_backward_gives_it() -> None:
    """Bit for bit: runs from before there was a choice go on as they were."""
    x0, target = latents()
    leaf = x0.clone().requires_grad_()
    whole = F.mse_loss(leaf, target)
    whole.backward()
    value, gradient = squared_error(x0, target)
    assert torch.equal(value, whole)
    assert torch.equal(gradient, leaf.grad)


@torch.no_grad()
def test_lpips_is_the_metrics_of_decoded_pictures(
    loss_of: Callable[[str], PerceptualLoss], shared_components: Components, files: Path
) -> None:
    metric, vae = load_lpips(files / "alexnet.pth"), shared_components.vae
    x0, target = latents()

    def expected(decode: Callable[[Tensor], Any], scaling: float) -> float:
        return metric(decode(x0 / scaling).sample, decode(target / scaling).sample).mean().item()

    wanted = expected(vae.decode, vae.config.scaling_factor)
    assert loss_of("lpips")(x0, target)[0].item() == pytest.approx(wanted, rel=1e-5)
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(files / "tiny")
    wanted = expected(tiny.decode, 1.0)
    assert wanted > 1e-3
    assert loss_of("lpips tiny")(x0, target)[0].item() == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_latent_lpips_is_torchvisions_network_on_latents(
    loss_of: Callable[[str], PerceptualLoss], tmp_path: Path
) -> None:
    """A file of the published sizes, in torchvision's own VGG16 with three poolings fewer."""
    path = latent_lpips_file(tmp_path, widths=(64, 128, 256, 512, 512))
    weights = torch.load(path, weights_only=True)
    vgg = torchvision.models.vgg16_bn()
    vgg.features[0] = torch.nn.Conv2d(4, 64, 3, padding=1)
    vgg.features.load_state_dict(
        {name.split(".", 2)[2]: t for name, t in weights.items() if name.startswith("net.")}
    )
    for place in (6, 13, 23):
        vgg.features[place] = torch.nn.Identity()
    x0, target = latents()
    expected, a, b = torch.zeros(2), x0, target
    for number, (begin, end) in enumerate([(0, 7), (7, 14), (14, 24), (24, 34), (34, 44)]):
        a, b = (vgg.features.eval()[begin:end](seen) for seen in (a, b))
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        row = weights[f"lin{number}.model.1.weight"]
        expected += F.conv2d(difference.square(), row).mean((1, 2, 3))
    assert a.shape[2:] == (4, 4)
    network = load_latent_lpips(path, "option", "there")
    torch.testing.assert_close(network(x0, target), expected, rtol=1e-4, atol=0)
    assert network(x0, x0).abs().max() == 0

    loss = loss_of("latent-lpips")
    both = loss.network(x0, target).mean() + (x0 - target).abs().mean()
    torch.testing.assert_close(loss(x0, target)[0], both)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(
    loss_of: Callable[[str], PerceptualLoss], name: str
) -> None:
    loss, (x0, target) = loss_of(name), latents()
    value, gradient = loss(x0, target)
    assert gradient.shape == x0.shape
    assert not gradient.requires_grad
    chosen = torch.rand(x0.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    for direction in (gradient, gradient * chosen):
        step = 3e-2 * direction / direction.norm()
        measured = (loss(x0 + step, target)[0] - loss(x0 - step, target)[0]).item()
        # Central differences of float32 sums over ReLUs, whose kinks are crossed here and there.
        assert measured == pytest.approx(2 * (gradient * step).sum().item(), rel=2e-2)
    assert value > 0
    assert all(p.grad is None for p in loss.network.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_rows_at_a_time_are_the_whole_batch(
    loss_of: Callable[[str], PerceptualLoss], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, (x0, target) = loss_of(name), latents(rows=5)
    value, gradient = loss(x0, target)
    seen: list[int] = []
    activations = loss.network.activations
    monkeypatch.setattr(
        loss.network, "activations", lambda x: seen.append(len(x)) or activations(x)
    )
    monkeypatch.setattr("train_lora.sampling.VAE_ROWS", 2)
    in_parts = loss(x0, target)
    assert seen == [2, 2, 2, 2, 1, 1]
    torch.testing.assert_close(in_parts[0], value)
    torch.testing.assert_close(in_parts[1], gradient, rtol=1e-3, atol=1e-5 * gradient.max().item())


def test_bf16_latents_get_a_float32_gradient(loss_of: Callable[[str], PerceptualLoss]) -> None:
    """Under autocast too: decoder and distance stay in float32."""
    loss, (x0, target) = loss_of("lpips tiny"), latents()
    x0 = x0.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = loss(x0, target)
    expected = loss(x0.float(), target)
    assert gradient.dtype == torch.float32
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> Components:
    return load_teacher()


@pytest.fixture(scope="module")
def teachers_pairs(
    tmp_path_factory: pytest.TempPathFactory, teacher: Components
) -> tuple[Callable[..., Config], TrainingData]:
    """Eight pairs by the embedded teacher, and the settings that take them."""
    folder = tmp_path_factory.mktemp("teachers")
    (folder / "prompts.txt").write_text("\n".join(demo_captions(8)))
    options = {
        "sampling__steps": 1,
        "sampling__conditioning_timestep": 399,
        "regression__warmup_iterations": 6,
        "regression__learning_rate": 3e-3,
        "regression__pairs": folder / "pairs",
        "regression__num_pairs": 8,
        "regression__teacher_steps": 4,
        "training__batch_size": 8,
        "gan__enabled": "false",
        "data__prompts": folder / "prompts.txt",
        "validation__every": 0,
    }

    def config(**more: Any) -> Config:
        return demo_config(folder / "run", **options | more)

    prepare.make_pairs(config())
    return config, load_training_data(config(), teacher)


@pytest.mark.parametrize("name", ["lpips", "latent-lpips"])
def test_each_loss_brings_the_student_nearer(
    name: str,
    settings: Callable[[str], dict[str, Any]],
    teachers_pairs: tuple[Callable[..., Config], TrainingData],
    teacher: Components,
) -> None:
    """To the teacher's pictures, against the untrained student: in the loss, and in the squared
    error of pictures, which it is not trained on."""
    make, data = teachers_pairs
    config = make(**settings(name))
    fresh = replace(teacher, unet=load_teacher().unet)
    trainer = build_trainer(config, fresh, data, Accelerator(cpu=True))
    pairs = data.pair_batch(first=0, size=8, seed=0)
    with torch.no_grad():
        wanted = teacher.vae.decode(pairs.latents / teacher.vae.config.scaling_factor).sample

    @torch.no_grad()
    def error() -> float:
        with trainer.distiller.unet.role("student"):
            x0 = trainer.distiller.denoiser(pairs.noise, torch.full((8,), 399), pairs.condition)
        made = teacher.vae.decode(x0 / teacher.vae.config.scaling_factor).sample
        return (made - wanted).square().mean().item()

    untrained = error()
    losses = [trainer.iterate(i)["loss/regression"].item() for i in range(6)]
    print(losses, untrained, error())
    assert losses[-1] < 0.8 * losses[0]
    assert error() < 0.8 * untrained


# -- runs that go on -------------------------------------------------------------------------------


def small_run(directory: Path, settings: dict[str, Any]) -> Trainer:
    sizes = {"training__batch_size": 2, "student__rank": 4, "critic__rank": 4}
    config = demo_config(directory, **STAGES | sizes | {"validation__every": 0} | settings)
    data = replace(small_data(), pairs=random_pairs())
    return build_trainer(config, random_components(), data, Accelerator(cpu=True))


def test_a_run_goes_on_with_its_own_networks(
    settings: Callable[[str], dict[str, Any]], files: Path, tmp_path: Path
) -> None:
    of_run = settings("lpips tiny")
    trainer = small_run(tmp_path / "run", of_run)
    trainer.iterate(0)
    trainer.iteration = 1
    trainer.save()
    trainer.iterate(1)
    checkpoint = tmp_path / "run" / "checkpoints" / "000001"
    state = read_state(checkpoint)
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes((files / "alexnet.pth").read_bytes())
    again = small_run(tmp_path / "run", of_run | {"regression__lpips_weights": moved})
    check_config(state, again.config, "run")
    restore(again, checkpoint, state)
    again.iterate(1)
    for one, other in zip(trainer.student.parameters, again.student.parameters, strict=True):
        assert torch.equal(one, other)

    other = tiny_vae_folder(tmp_path / "other", width=16)
    changed = small_run(tmp_path / "run", of_run | {"regression__tiny_vae": other})
    with pytest.raises(
        ValueError, match=r"its regression loss's networks is .* set --regression.l"
    ):
        restore(changed, checkpoint, state)
    with pytest.raises(ValueError, match=r"regression.loss is .mse., but the run in run has trai"):
        check_config(state, small_run(tmp_path / "run", {}).config, "run")


# -- pairs ---------------------------------------------------------------------------------------


def test_pairs_of_other_prompts_are_refused(
    teachers_pairs: tuple[Callable[..., Config], TrainingData],
    teacher: Components,
    tmp_path: Path,
) -> None:
    make, _ = teachers_pairs
    (tmp_path / "others.txt").write_text("\n".join(demo_captions(9)))
    with pytest.raises(ValueError, match=r"with data.prompts 'prompts.txt', but .* 'others.txt'"):
        load_training_data(make(data__prompts=tmp_path / "others.txt"), teacher)
