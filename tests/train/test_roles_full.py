"""Roles that are full copies: the same interface, weights of their own."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch

from train_lora.models.roles import CRITIC, STUDENT, TEACHER, FullSpec, LoraSpec, SharedUNet

LORA = LoraSpec(rank=2, alpha=2)
with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def shared_unet(components, **roles) -> SharedUNet:
    unet = SharedUNet(copy.deepcopy(components.unet), roles, seed=3)
    generator = torch.Generator().manual_seed(5)
    for role in roles:
        for weight in unet.parameters_of(role):
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def both(shared_components) -> SharedUNet:
    """A LoRA student beside a full critic; tests leave the weights as they are."""
    return shared_unet(shared_components, student=LORA, critic=FullSpec())


def test_a_copy_starts_as_the_teacher_and_has_weights_of_its_own(components, make_inputs):
    unet = SharedUNet(components.unet, {STUDENT: FullSpec(), CRITIC: LORA}, seed=3)
    base = sum(
        weight.numel() for weight in components.unet.parameters() if not weight.requires_grad
    )
    assert sum(weight.numel() for weight in unet.parameters_of(STUDENT)) == base
    with torch.no_grad():
        expected = unet(*make_inputs())
        with unet.role(STUDENT):
            assert torch.equal(unet(*make_inputs()), expected)
            unet.parameters_of(STUDENT)[0].add_(0.1)
            assert not torch.equal(unet(*make_inputs()), expected)
        assert torch.equal(unet(*make_inputs()), expected)  # the teacher, untouched


def test_roles_switch_between_copy_adapter_and_base(both, make_inputs):
    outputs = {}
    with torch.no_grad():
        for role in (TEACHER, STUDENT, CRITIC):
            with both.role(role):
                outputs[role] = both(*make_inputs())
        with both.role(STUDENT):
            with both.role(CRITIC):
                assert torch.equal(both(*make_inputs()), outputs[CRITIC])
                with both.role(TEACHER):
                    assert torch.equal(both(*make_inputs()), outputs[TEACHER])
            assert torch.equal(both(*make_inputs()), outputs[STUDENT])
        with both.role(CRITIC), both.role(STUDENT):
            assert torch.equal(both(*make_inputs()), outputs[STUDENT])
    assert not torch.equal(outputs[STUDENT], outputs[CRITIC])
    assert both.roles == [TEACHER, STUDENT, CRITIC]


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize(("role", "other"), [(STUDENT, CRITIC), (CRITIC, STUDENT)])
def test_gradients_reach_the_active_role_only(both, make_inputs, role, other, features):
    both.zero_grad(set_to_none=True)
    with both.role(role):
        output = both.features(*make_inputs())[0] if features else both(*make_inputs())
        output.square().mean().backward()
    reached = [weight.grad is not None for weight in both.parameters_of(role)]
    assert all(reached) if not features else any(reached)
    assert all(weight.grad is None for weight in both.parameters_of(other))
    both.zero_grad(set_to_none=True)


def test_checkpointing_a_copy_gives_the_same_gradients(both, make_inputs):
    results = []
    for recompute in (False, True):
        if recompute:
            both.enable_gradient_checkpointing()
        with both.role(CRITIC):
            loss = both(*make_inputs()).square().mean()
        with both.role(STUDENT):
            loss.backward()
        results.append([weight.grad.clone() for weight in both.parameters_of(CRITIC)])
        both.zero_grad(set_to_none=True)
    for network in (both.unet, *both.copies.values()):
        network.disable_gradient_checkpointing()
    assert all(map(torch.equal, *results))


def test_a_copys_state_is_its_weights(both, components, make_inputs):
    other = SharedUNet(components.unet, {STUDENT: LORA, CRITIC: FullSpec()}, seed=8)
    other.load_role_state_dict(CRITIC, both.role_state_dict(CRITIC))
    with torch.no_grad(), both.role(CRITIC), other.role(CRITIC):
        assert torch.equal(both(*make_inputs()), other(*make_inputs()))
    with pytest.raises(ValueError, match="tensors do not fit the critic's weights"):
        other.load_role_state_dict(CRITIC, both.role_state_dict(STUDENT))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("4bit", marks=with_bitsandbytes)])
def test_copies_keep_float32_over_a_lower_base(components, make_inputs, precision):
    original = components.unet.conv_out.weight.clone()
    specs = {STUDENT: FullSpec(), CRITIC: LORA}
    unet = SharedUNet(components.unet, specs, seed=3, precision=precision, autocast=torch.bfloat16)
    unet.to("cpu")  # quantised weights shrink here
    assert unet.unet.conv_in.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in unet.parameters_of(STUDENT)} == {torch.float32}
    assert torch.equal(unet.copies[STUDENT].conv_out.weight, original)  # not rounded on the way
    with torch.no_grad(), unet.role(STUDENT):
        assert unet(*make_inputs()).dtype == torch.float32
    with unet.role(CRITIC):  # on the base, with the copy beside it
        unet(*make_inputs()).square().mean().backward()
    assert any(weight.grad.abs().max() > 0 for weight in unet.parameters_of(CRITIC))
