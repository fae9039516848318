"""One base in three roles: bit-exact teacher, gradients in one adapter only, safe recomputation."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin

from train_lora.models.convert import base_state_dict
from train_lora.models.roles import CRITIC, STUDENT, TEACHER, LoraSpec, SharedUNet

SPECS = {STUDENT: LoraSpec(rank=4, alpha=2), CRITIC: LoraSpec(rank=6, alpha=6)}


def randomise(shared: SharedUNet, std: float = 0.05) -> None:
    """Adapters away from their zero start."""
    generator = torch.Generator().manual_seed(5)
    for role in shared.adapters:
        for weight in shared.parameters_of(role):
            weight.data.normal_(std=std, generator=generator)


@pytest.fixture(scope="module")
def _shared(shared_components) -> SharedUNet:
    shared = SharedUNet(copy.deepcopy(shared_components.unet), SPECS, seed=3)
    randomise(shared)
    return shared


@pytest.fixture
def shared(_shared) -> Iterator[SharedUNet]:
    """Adapters away from zero; tests leave the weights as they are."""
    yield _shared
    _shared.zero_grad(set_to_none=True)
    _shared.unet.disable_gradient_checkpointing()


def gradients(shared: SharedUNet, role: str) -> list[torch.Tensor]:
    found = [weight.grad for weight in shared.parameters_of(role)]
    shared.zero_grad(set_to_none=True)
    return found


# Roles


def test_the_teacher_is_the_base_bit_for_bit(components, make_inputs):
    x_t, t, condition = make_inputs()
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    with torch.no_grad():
        base = components.unet(x_t, t, condition.hidden, added_cond_kwargs=added).sample
        shared = SharedUNet(components.unet, SPECS, seed=3)
        randomise(shared)
        assert torch.equal(shared(x_t, t, condition), base)  # outside of any role
        with shared.role(STUDENT), shared.role(TEACHER):
            assert torch.equal(shared(x_t, t, condition), base)


def test_untrained_adapters_change_nothing(components, make_inputs):
    shared = SharedUNet(components.unet, SPECS, seed=3)
    outputs = []
    with torch.no_grad():
        for role in (TEACHER, STUDENT, CRITIC):
            with shared.role(role):
                outputs.append(shared(*make_inputs()))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_an_adapter_is_its_low_rank_product_added_to_the_weights(components, make_inputs):
    shared = SharedUNet(components.unet, SPECS, seed=3)
    randomise(shared)
    inputs = make_inputs()
    with shared.role(STUDENT):
        expected = shared(*inputs)
    for module, down, up in shared.pairs_of(STUDENT):
        weight = shared.unet.get_submodule(module).base_layer.weight
        weight += (2 / 4) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    # float32 sums in another order, through 129 layers
    torch.testing.assert_close(shared(*inputs), expected, atol=2e-5, rtol=1e-5)


def test_roles_nest_and_are_restored_after_errors(shared):
    with shared.role(STUDENT):
        with pytest.raises(KeyError), shared.role(CRITIC):
            raise KeyError(shared.active_role)
        assert shared.active_role == STUDENT
        with shared.role(TEACHER), shared.role(STUDENT):
            assert shared.active_role == STUDENT
        assert shared.active_role == STUDENT
    assert shared.active_role == TEACHER


def test_an_unknown_role_is_refused(shared):
    with pytest.raises(ValueError, match="role 'pupil' is unknown: use one of teacher, student"):
        shared.role("pupil")


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="LoRA rank is 0: use 1 or more"):
        LoraSpec(rank=0, alpha=1)
    with pytest.raises(ValueError, match="LoRA alpha is nan: use a positive number"):
        LoraSpec(rank=1, alpha=float("nan"))


def test_switching_never_touches_requires_grad_nor_peft(shared, monkeypatch):
    def flags():
        return [weight.requires_grad for weight in shared.parameters()]

    monkeypatch.delattr(PeftAdapterMixin, "set_adapter")  # would raise if it were used
    before = flags()
    adapters = [*shared.parameters_of(STUDENT), *shared.parameters_of(CRITIC)]
    assert sum(before) == len(adapters) == 4 * len(shared.modules_with_adapter)
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in adapters)
    for role in (STUDENT, TEACHER, CRITIC):
        with shared.role(role):
            assert flags() == before
    assert flags() == before


def test_switching_is_fast(shared):
    start = time.perf_counter()
    for _ in range(20):
        with shared.role(STUDENT), shared.role(CRITIC):
            pass
    # 80 switches of 129 layers; 0.02 ms each measured, 1 ms leaves room for a busy machine
    assert (time.perf_counter() - start) / 80 < 1e-3


# Gradients


@pytest.mark.parametrize(("role", "other"), [(STUDENT, CRITIC), (CRITIC, STUDENT)])
def test_gradients_reach_the_active_adapter_only(shared, make_inputs, role, other):
    with shared.role(role):
        shared(*make_inputs()).square().mean().backward()
    assert all(
        gradient.abs().max() > 0 for gradient in (w.grad for w in shared.parameters_of(role))
    )
    assert all(weight.grad is None for weight in shared.parameters_of(other))
    assert all(w.grad is None for n, w in shared.named_parameters() if "lora_" not in n)


def test_a_switch_between_forward_and_backward_is_harmless(shared, make_inputs):
    with shared.role(STUDENT):
        shared(*make_inputs()).square().mean().backward()
    expected = gradients(shared, STUDENT)
    with shared.role(STUDENT):
        loss = shared(*make_inputs()).square().mean()
    with shared.role(CRITIC):
        loss.backward()
    assert all(map(torch.equal, gradients(shared, STUDENT), expected))


@pytest.mark.parametrize("door", ["forward", "features", "with_features"])
@pytest.mark.parametrize("during_backward", [STUDENT, CRITIC, TEACHER])
def test_checkpointing_recomputes_in_the_role_of_the_forward(
    shared, make_inputs, door, during_backward
):
    x_t, t, condition = make_inputs()
    results = []
    for recompute in (False, True):
        if recompute:
            shared.enable_gradient_checkpointing()
        sample = x_t.clone().requires_grad_()
        with shared.role(STUDENT):
            if door == "forward":
                found = [shared(sample, t, condition)]
            elif door == "features":
                found = shared.features(sample, t, condition, ("down1", "middle"))
            else:
                output, maps = shared.with_features(sample, t, condition, ("down1", "middle"))
                found = [output, *maps]
            loss = torch.cat([part.flatten() for part in found]).square().mean()
        with shared.role(during_backward):
            loss.backward()
            assert shared.active_role == during_backward
        found = [g for g in gradients(shared, STUDENT) if g is not None]
        results.append([loss.detach(), sample.grad, *found])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


def test_checkpointing_recomputes_twice(shared, make_inputs):
    """One graph walked twice enters the role again each time."""
    shared.enable_gradient_checkpointing()
    with shared.role(STUDENT):
        loss = shared(*make_inputs()).square().mean()
    loss.backward(retain_graph=True)
    parameters = shared.parameters_of(STUDENT)
    once = [weight.grad.clone() for weight in parameters]
    loss.backward()
    assert all(torch.equal(w.grad, 2 * g) for w, g in zip(parameters, once, strict=True))


# Features


@pytest.mark.parametrize("role", [TEACHER, STUDENT, CRITIC])
def test_features_are_the_blocks_outputs_and_no_decoder_runs(shared, make_inputs, role):
    inputs = make_inputs()
    made, ran = {}, []
    blocks = dict(zip(("down1", "down2", "down3"), shared.unet.down_blocks, strict=True))
    blocks["middle"] = shared.unet.mid_block
    with ExitStack() as stack, torch.no_grad(), shared.role(role):
        hooks = [
            block.register_forward_hook(lambda m, a, out, name=name: made.update({name: out}))
            for name, block in blocks.items()
        ]
        output = shared(*inputs)
        for hook in hooks:
            hook.remove()
        both = shared.with_features(*inputs, ("middle", "down1"))
        for block in (*shared.unet.up_blocks, shared.unet.conv_out):
            stack.callback(block.register_forward_hook(lambda *_: ran.append(1)).remove)
        (middle,) = shared.features(*inputs)
        found = shared.features(*inputs, tuple(shared.layers))
    assert torch.equal(middle, made["middle"])
    for name, feature_map in zip(shared.layers, found, strict=True):
        made_map = made[name] if name == "middle" else made[name][0]
        assert torch.equal(feature_map, made_map)
        channels, downscale = shared.layers[name]
        assert feature_map.shape == (2, channels, 16 // downscale, 16 // downscale)
    assert list(shared.layers) == ["down1", "down2", "down3", "middle"]
    assert not ran
    assert torch.equal(both[0], output)
    assert torch.equal(both[1][0], made["middle"])
    assert torch.equal(both[1][1], made["down1"][0])


# Weights


def test_initial_weights_depend_on_seed_role_and_module_alone(components, shared_components):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = SharedUNet(components.unet, SPECS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # no hidden randomness
    torch.manual_seed(2)
    reversed_specs = dict(reversed(SPECS.items()))
    second = SharedUNet(copy.deepcopy(shared_components.unet), reversed_specs, seed=3)
    third = SharedUNet(copy.deepcopy(shared_components.unet), SPECS, seed=4)
    for role in SPECS:
        for (_, down, up), (_, same, _), (_, other, _) in zip(
            first.pairs_of(role), second.pairs_of(role), third.pairs_of(role), strict=True
        ):
            assert torch.equal(down, same)
            assert not torch.equal(down, other)
            bound = down[0].numel() ** -0.5  # kaiming-uniform with a = sqrt(5)
            assert 0.5 * bound < down.abs().max() <= bound
            assert not up.any()


def test_adapters_are_float32_on_a_bfloat16_base(components, make_inputs):
    shared = SharedUNet(components.unet.to(torch.bfloat16), SPECS, seed=3)
    randomise(shared)
    with shared.role(STUDENT):
        output = shared(*make_inputs())
        assert shared.features(*make_inputs())[0].dtype == torch.float32
    assert output.dtype == torch.float32
    output.square().mean().backward()
    for weight in shared.parameters_of(STUDENT):
        assert weight.dtype == weight.grad.dtype == torch.float32
    assert {t.dtype for t in base_state_dict(shared.unet).values()} == {torch.bfloat16}


def test_state_dicts_copy_one_role_into_another_model(shared, shared_components, make_inputs):
    other = SharedUNet(copy.deepcopy(shared_components.unet), SPECS, seed=9)
    other.load_role_state_dict(STUDENT, shared.role_state_dict(STUDENT))
    with torch.no_grad(), shared.role(STUDENT), other.role(STUDENT):
        assert torch.equal(shared(*make_inputs()), other(*make_inputs()))
    state = shared.role_state_dict(STUDENT)
    assert list(state)[:2] == [
        "down_blocks.0.resnets.0.conv1.lora_A.weight",
        "down_blocks.0.resnets.0.conv1.lora_B.weight",
    ]
    parameters = shared.parameters_of(STUDENT)
    assert all(
        t.data_ptr() == p.data_ptr() for t, p in zip(state.values(), parameters, strict=True)
    )


def test_states_that_do_not_fit_are_refused_before_anything_changes(shared):
    before = {name: t.clone() for name, t in shared.role_state_dict(CRITIC).items()}
    with pytest.raises(ValueError, match="258 tensors do not fit the critic's weights, first"):
        shared.load_role_state_dict(CRITIC, shared.role_state_dict(STUDENT))  # another rank
    with pytest.raises(ValueError, match=r"1 tensors do not fit the critic's weights, first 'x'"):
        shared.load_role_state_dict(CRITIC, before | {"x": torch.zeros(1)})
    after = shared.role_state_dict(CRITIC)
    assert all(torch.equal(after[name], before[name]) for name in before)
