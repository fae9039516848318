"""An EDM network as teacher and critic: its passes, its features, its conditions."""

from __future__ import annotations

import pytest
import torch

from dmd2_core import SteppedSchedule
from train_lora.models.class_condition import ClassCondition
from train_lora.models.roles import CRITIC, FullSpec, SharedUNet

from .tiny_edm import SIDE_PX, inputs, random_teacher


@pytest.fixture
def some_network():
    """Away from its start, so that every weight counts."""
    network = random_teacher()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def test_a_step_is_the_noise_level_that_the_network_is_told(some_network) -> None:
    x_t, t, condition = inputs()
    sigma = SteppedSchedule.edm().time(t)
    assert sigma.tolist()[::2] == pytest.approx([0.002, 80.0])
    expected = some_network(x_t, sigma, condition.labels)
    middle = some_network.features(x_t, sigma, condition.labels)
    unet = SharedUNet(some_network, {CRITIC: FullSpec()}, seed=0)
    for role in ("teacher", "critic"):
        with unet.role(role):
            assert torch.equal(unet(x_t, t, condition), expected)
            features = unet.features(x_t, t, condition, list(unet.layers))
            output, same = unet.with_features(x_t, t, condition, list(unet.layers))
        assert torch.equal(output, expected)
        assert torch.equal(features[-1], middle)
        for found, again, shape in zip(features, same, unet.layers.values(), strict=True):
            assert torch.equal(found, again)
            assert found.shape == (3, shape.channels, 8 // shape.downscale, 8 // shape.downscale)
    assert list(unet.layers) == ["down1", "middle"]


def test_checkpointed_blocks_give_the_same_gradients(some_network) -> None:
    found = []
    for checkpointed in (False, True):
        unet = SharedUNet(some_network, {CRITIC: FullSpec()}, seed=0)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        with unet.role(CRITIC):
            (maps,) = unet.features(*inputs())
            (unet(*inputs()).square().mean() + maps.mean()).backward()
        found.append([weight.grad for weight in unet.parameters_of(CRITIC)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_under_autocast_only_the_raw_network_is_rounded(some_network) -> None:
    """At the lowest noise D(x) is x but for a thousandth: bfloat16 alone would lose 1 in 256."""
    exact, rounded = (
        SharedUNet(some_network, {}, seed=0, autocast=a) for a in (None, torch.bfloat16)
    )
    with torch.no_grad():
        expected, found = exact(*inputs()), rounded(*inputs())
    assert found.dtype == torch.float32
    assert (found - expected)[0].abs().max() < 1e-3 * 2**-6 * 8  # c_out 0.002, F of a few units
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_class_conditions_are_cut_and_joined_like_captions() -> None:
    condition = inputs()[2]
    assert condition[1].labels.tolist() == [1]
    assert condition[torch.tensor([2, 0])].labels.tolist() == [2, 0]
    assert ClassCondition.cat([condition[:1], condition[1:]]).labels.tolist() == [0, 1, 2]
    assert condition.latent_shape() == (3, 3, SIDE_PX, SIDE_PX)
