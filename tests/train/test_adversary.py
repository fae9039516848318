"""The choices around the discriminator: against hand-written losses, and that each trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_model import meta_unet
from dmd2_core import Divergence, LayerHeads, MiddleBlockHead, add_noise, derived_generator
from train_lora.checkpoint import check_config, read_state, restore
from train_lora.config_load import load
from train_lora.config_losses import DistributionMatchingConfig
from train_lora.distill import Batch, Distiller, StudentSample
from train_lora.draws import Draws, randn_like, random_timesteps, sample_draws
from train_lora.loop import HEAD_STREAM
from train_lora.matching import matching_gradient
from train_lora.models.passes import Passes

from .tiny import SMALL, demo_config, random_batch, random_distiller, small_trainer

WEIGHT = 0.1
"""gan.critic_weight of the demo preset."""


def made(tmp_path: Path, **overrides: object) -> Distiller:
    return random_distiller(demo_config(tmp_path / "run", **overrides))


@pytest.fixture
def batch() -> Batch:
    return random_batch(2, torch.Generator().manual_seed(5))


def draws() -> Draws:
    return sample_draws(11, first=0, count=2)


def critic_gradients(distiller: Distiller) -> list[Tensor | None]:
    weights = (*distiller.unet.parameters_of("critic"), *distiller.head.parameters())
    return [weight.grad for weight in weights]


def noised(distiller: Distiller, x: Tensor, from_: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and eps as a pass draws them."""
    t = random_timesteps(0, 999, x, from_)
    eps = randn_like(x, from_)
    return add_noise(distiller.components.schedule, x, eps, t), t, eps


def mean_logits(distiller: Distiller, role: str, *inputs: object) -> Tensor:
    """The mean of what each head says of its own map."""
    names = tuple(distiller.head.heads)
    with distiller.unet.role(role):
        maps = distiller.unet.features(*inputs, names)
    logits = [distiller.head.heads[n](m) for n, m in zip(names, maps, strict=True)]
    return sum(logits) / len(logits)


def same(found: list[Tensor | None], expected: tuple[Tensor, ...]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        # The same float32 kernels with batches cut otherwise.
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-6)


# -- which features --------------------------------------------------------------------------------


def test_the_papers_head_is_drawn_as_before(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    wanted = MiddleBlockHead(96, 4, generator=derived_generator(0, HEAD_STREAM)).state_dict()
    found = trainer.distiller.head.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_on_the_teachers_features_the_gan_trains_the_head_alone(
    tmp_path: Path, batch: Batch
) -> None:
    distiller = made(tmp_path, gan__features="teacher")
    sample = distiller.student_sample(batch, 2, draws(), with_graph=True)

    x = sample.x0.detach().requires_grad_()
    x_t, t, _ = noised(distiller, x, draws())
    with distiller.unet.role("teacher"):
        logits = distiller.head(*distiller.unet.features(x_t, t, sample.condition))
    (wanted,) = torch.autograd.grad(F.softplus(-logits).mean(), x)
    _, found = distiller.adversary.generator_gradient(sample.x0.detach(), sample.condition, draws())
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 0

    distiller.critic_step(sample.detached(), batch, draws())
    of_body = [weight.grad.clone() for weight in distiller.unet.parameters_of("critic")]
    assert all(weight.grad.abs().max() > 0 for weight in distiller.head.parameters())
    alone = made(tmp_path, gan__enabled="false")
    alone.critic_step(sample.detached(), batch, draws())
    denoising = [weight.grad for weight in alone.unet.parameters_of("critic")]
    assert all(map(torch.equal, of_body, denoising))


def test_several_layers_have_a_head_each_and_the_mean_counts(tmp_path: Path, batch: Batch) -> None:
    distiller = made(tmp_path, gan__layers="all")
    assert list(distiller.head.heads) == ["down1", "down2", "down3", "middle"]
    x_t, t, _ = noised(distiller, batch.real.latents, draws())
    expected = mean_logits(distiller, "critic", x_t, t, batch.real.condition)
    with distiller.unet.role("critic"):
        found = distiller.adversary.logits_at(x_t, t, batch.real.condition)
    torch.testing.assert_close(found, expected)

    two = made(tmp_path, gan__layers="middle,down1").head
    assert {name: head.logit.in_channels for name, head in two.heads.items()} == {
        "middle": 96,
        "down1": 32,
    }


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    message = (
        'gan.layers names "down4", which this model does not have; choose from down1, down2, '
        'down3, middle, or write "all".'
    )
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path / "run", gan__layers="down4,middle")
    for value in ("[]", "middle,middle", "all,middle"):
        with pytest.raises(ValueError, match=r"gan.layers is \[.*\]; name each layer once"):
            demo_config(tmp_path, gan__layers=value)
    with pytest.raises(ValueError, match=r'gan.layers is .*; set it to a list .* "middle" or'):
        demo_config(tmp_path, gan__layers="up1")


# -- the critic's step against losses written out --------------------------------------------------


def test_a_shared_draw_saves_a_pass_and_adds_up_the_two_losses(
    tmp_path: Path, batch: Batch
) -> None:
    rows: dict[str, list[int]] = {}
    for shared in ("false", "true"):
        distiller = made(tmp_path, gan__shared_draw=shared, gan__layers="down2,middle")
        sample = distiller.student_sample(batch, 2, draws(), with_graph=False)
        seen = rows[shared] = []
        hook = distiller.unet.unet.conv_in.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        figures = distiller.critic_step(sample, batch, draws())
        hook.remove()
    # Images through the network: 2 to denoise and 2 + 2 to judge; the last 2 are saved.
    assert (sum(rows["false"]), sum(rows["true"])) == (6, 4)

    found = [g.clone() for g in critic_gradients(distiller)]
    one = draws()
    x_t, t, eps = noised(distiller, sample.x0, one)
    with distiller.unet.role("critic"):
        output = distiller.unet(x_t, t, sample.condition)
    alpha, sigma = (
        part(t).view(-1, 1, 1, 1)
        for part in (distiller.components.schedule.alpha, distiller.components.schedule.sigma)
    )
    velocity = (alpha * x_t - (x_t - sigma * output) / alpha) / sigma  # critic.loss_space
    denoising = (velocity - (alpha * eps - sigma * sample.x0)).square().mean().float()
    fake = mean_logits(distiller, "critic", x_t, t, sample.condition)
    real_t, t, _ = noised(distiller, batch.real.latents, one)
    real = mean_logits(distiller, "critic", real_t, t, batch.real.condition)
    gan = F.softplus(fake).mean() + F.softplus(-real).mean()
    weights = (*distiller.unet.parameters_of("critic"), *distiller.head.parameters())
    separate = [torch.autograd.grad(part, weights, allow_unused=True) for part in (denoising, gan)]
    total = tuple(
        (0 if a is None else a) + WEIGHT * (0 if b is None else b)
        for a, b in zip(*separate, strict=True)
    )
    same(found, total)
    torch.testing.assert_close(figures["loss/gan_critic"], gan.detach())
    torch.testing.assert_close(figures["loss/critic"], denoising.detach())


@pytest.mark.parametrize("shared", ["false", "true"])
def test_r1_compares_real_images_with_slightly_noised_ones(
    tmp_path: Path, batch: Batch, shared: str
) -> None:
    settings = {"gan__r1_weight": 100, "gan__r1_noise": 0.05, "gan__shared_draw": shared}
    plain = made(tmp_path, gan__shared_draw=shared)
    sample = plain.student_sample(batch, 2, draws(), with_graph=False)
    plain.critic_step(sample, batch, draws())
    distiller = made(tmp_path, **settings)
    figures = distiller.critic_step(sample, batch, draws())

    one = draws()
    t_eps = [noised(distiller, sample.x0, one)]  # the denoising pass
    both = torch.cat([batch.real.latents, sample.x0])
    if shared == "true":
        both = batch.real.latents
    t_eps.append(noised(distiller, both, [*one] * (len(both) // 2)))
    _, t, eps = (part[:2] for part in t_eps[1])
    moved = batch.real.latents + 0.05 * randn_like(batch.real.latents, one)
    schedule, logits = distiller.components.schedule, []
    with distiller.unet.role("critic"):
        for x in (batch.real.latents, moved):
            maps = distiller.unet.features(add_noise(schedule, x, eps, t), t, batch.real.condition)
            logits.append(distiller.head(*maps))
    penalty = (logits[0] - logits[1]).square().mean()
    torch.testing.assert_close(figures["loss/r1"], penalty.detach(), rtol=1e-3, atol=0)
    weights = (*distiller.unet.parameters_of("critic"), *distiller.head.parameters())
    of_penalty = torch.autograd.grad(WEIGHT * 100 * penalty, weights, allow_unused=True)
    expected = tuple(
        without if added is None else without + added
        for without, added in zip(critic_gradients(plain), of_penalty, strict=True)
    )
    same(critic_gradients(distiller), expected)


# -- the divergence --------------------------------------------------------------------------------


def test_the_configuration_offers_the_cores_divergences() -> None:
    hint = get_type_hints(DistributionMatchingConfig)["divergence"]
    assert get_args(hint) == get_args(Divergence)


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_the_divergence_weights_each_sample_by_its_logit_at_the_same_noise(
    tmp_path: Path, batch: Batch, features: str
) -> None:
    plain = made(tmp_path)
    settings = {"distribution_matching__divergence": "forward-kl", "gan__features": features}
    distiller = made(tmp_path, **settings)
    x = batch.real.latents
    sample = StudentSample(x0=x, condition=batch.condition, timestep=499)
    gradients = [matching_gradient(d, sample, draws()) for d in (plain, distiller)]
    one = draws()
    t = random_timesteps(20, 980, x, one)
    x_t = add_noise(distiller.components.schedule, x, randn_like(x, one), t)
    with torch.no_grad(), distiller.unet.role(features):
        logits = distiller.head(*distiller.unet.features(x_t, t, batch.condition))
    assert logits.std() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0] * logits.exp().view(2, 1, 1, 1))

    # The mean over the updates is brought to 1: a tenth of the way at each.
    distiller.adversary.settle()
    mean = 0.9 * 1 + 0.1 * logits.exp().mean()
    assert distiller.adversary.mean_weight == pytest.approx(float(mean), rel=1e-6)
    again = matching_gradient(distiller, sample, draws())
    torch.testing.assert_close(again, gradients[1] / mean)
    assert plain.adversary.settle() == {}


def test_options_without_effect_are_errors(tmp_path: Path) -> None:
    minimal = {"model.path": "m", "data.prompts": "demo", "output.directory": "o"}
    minimal |= {"data.real_images": "demo"}
    for settings, message in (
        ({"gan.r1_noise": "0.1"}, r"gan.r1_noise .* because gan.r1_weight is 0"),
        (
            {"gan.shared_draw": "true", "gan.features": "teacher"},
            r"gan.shared_draw is true but has no effect, because gan.features is 'teacher'",
        ),
        (
            {"gan.shared_draw": "true", "distribution_matching.enabled": "false"},
            r"gan.shared_draw .* because distribution_matching.enabled is false",
        ),
        (
            {
                "critic.rank": "8",
                "gan.features": "teacher",
                "distribution_matching.enabled": "false",
            },
            r"critic.rank is 8 but has no effect, because gan.features is 'teacher' and",
        ),
        (
            {"gan.enabled": "false", "distribution_matching.divergence": "forward-kl"},
            r'divergence is "forward-kl", .* but gan.enabled is false; set gan.enabled to true',
        ),
    ):
        values = {k: v for k, v in minimal.items() if k != "data.real_images"} | settings
        if settings.get("gan.enabled") != "false":
            values |= minimal
        with pytest.raises(ValueError, match=message):
            load(overrides=list(values.items()))


# -- training --------------------------------------------------------------------------------------


CHOICES: dict[str, dict[str, object]] = {
    "paper": {},
    "teacher": {"gan__features": "teacher"},
    "r1": {"gan__r1_weight": 300.0, "gan__r1_noise": 0.1},
    "together": {
        "distribution_matching__divergence": "jensen-shannon",
        "gan__layers": "all",
        "gan__r1_weight": 10.0,
        "gan__shared_draw": "true",
    },
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Of each choice after some updates of the critic on one batch that the student does not
    change: the GAN loss and the approximate R1 penalty at draws of their own."""
    found = {}
    for name, overrides in CHOICES.items():
        folder = tmp_path_factory.mktemp(name)
        trainer = small_trainer(folder, critic__warmup_iterations=100, **overrides)
        trainer.data.buckets[0].images.part.columns["latents"].mul_(0.5).add_(0.5)
        for iteration in range(12):
            figures = trainer.iterate(iteration)
            assert all(value.isfinite().all() for value in figures.values())
        found[name] = judged(trainer.distiller)
    return found


def judged(distiller: Distiller) -> dict[str, float]:
    adversary = copy.copy(distiller.adversary)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    real = 0.5 * latents + 0.5
    batch = random_batch(8, torch.Generator().manual_seed(2))
    sample = distiller.student_sample(batch, 0, sample_draws(5, first=0, count=8), with_graph=False)
    one = sample_draws(6, first=0, count=8)
    t = random_timesteps(0, 600, real, one)
    eps = randn_like(real, one)
    moved = real + 0.1 * randn_like(real, one)
    logits = []
    with torch.no_grad(), distiller.unet.role(adversary.settings.features):
        for x in (real, moved, sample.x0):
            x_t = add_noise(distiller.components.schedule, x, eps, t)
            logits.append(adversary.logits_at(x_t, t, batch.condition))
    on_real, on_moved, on_fake = logits
    gan = F.softplus(on_fake).mean() + F.softplus(-on_real).mean()
    return {"gan": float(gan), "r1": float((on_real - on_moved).square().mean())}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_discriminator_learns_with_every_choice(losses, choice: str) -> None:
    """Even odds are 2 log 2 = 1.386."""
    assert losses[choice]["gan"] < 1.0, losses


def test_r1_keeps_the_logits_of_real_images_flat(losses) -> None:
    assert losses["r1"]["r1"] < 0.3 * losses["paper"]["r1"], losses  # 0.11 here


def test_a_resumed_run_has_the_same_bits_and_other_layers_are_refused(tmp_path: Path) -> None:
    settings = CHOICES["together"] | {"critic__updates_per_generator": 1, "critic__rank": 2}
    settings |= {"distribution_matching__divergence": "forward-kl", "gan__features": "critic"}
    trainer = small_trainer(tmp_path / "run", **settings)
    for iteration in range(2):
        figures = trainer.iterate(iteration)
        trainer.iteration += 1
        assert "divergence/weight" in figures
        if iteration == 0:
            trainer.save()
    assert trainer.distiller.adversary.mean_weight != 1.0
    checkpoint = tmp_path / "run" / "checkpoints" / "000001"
    resumed = small_trainer(tmp_path / "run", **settings)
    restore(resumed, checkpoint, read_state(checkpoint))
    assert resumed.distiller.adversary.mean_weight != 1.0
    resumed.iterate(1)
    assert resumed.distiller.adversary.mean_weight == trainer.distiller.adversary.mean_weight
    for one, other in ((trainer.student, resumed.student), (trainer.critic, resumed.critic)):
        assert all(map(torch.equal, one.parameters, other.parameters))
    assert "head.heads.down1.logit.weight" in trainer.critic.names

    other = demo_config(tmp_path / "run", **SMALL | settings | {"gan__layers": "middle"})
    with pytest.raises(ValueError, match=r"gan.layers is \['middle'\], but the run in .* has"):
        check_config(read_state(checkpoint), other, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "px", "sides"),
    [("sdxl", 1024, [64, 32, 32, 32]), ("sd15", 512, [32, 16, 8, 8, 8])],
)
def test_full_models_have_the_maps_that_the_heads_are_made_for(
    kind: Literal["sdxl", "sd15"], px: int, sides: list[int]
) -> None:
    """Shapes only, on the meta device."""
    passes = Passes(meta_unet(kind))
    channels = [*passes.unet.config.block_out_channels, passes.unet.config.block_out_channels[-1]]
    with torch.device("meta"):
        added = None
        if kind == "sdxl":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        hidden = torch.empty(1, 77, passes.unet.config.cross_attention_dim)
        latents = torch.empty(1, 4, px // 8, px // 8)
        maps = passes.features(latents, torch.empty(1), hidden, added, tuple(passes.layers))
        shapes = {
            name: (shape.channels, px // 8 // shape.downscale)
            for name, shape in passes.layers.items()
        }
        assert LayerHeads(shapes)(*maps).shape == (1,)
    assert list(shapes.values()) == list(zip(channels, sides, strict=True))
    assert [(m.shape[1], m.shape[2]) for m in maps] == list(shapes.values())
