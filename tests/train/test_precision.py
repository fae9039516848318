"""Precisions of the base, autocast in every pass, 8-bit optimizer, compiled blocks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from train_lora.model_setup import base_precision
from train_lora.models.precision import check_precision
from train_lora.models.roles import CRITIC, STUDENT, FullSpec, LoraSpec, SharedUNet
from train_lora.optimizer import build_optimizer

from .tiny import demo_config

SPECS = {STUDENT: LoraSpec(rank=2, alpha=2), CRITIC: LoraSpec(rank=2, alpha=2)}
with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def shared_unet(components, precision, autocast=torch.bfloat16, specs=SPECS) -> SharedUNet:
    with warnings.catch_warnings():  # bitsandbytes' own, at its import
        warnings.simplefilter("ignore")
        unet = SharedUNet(
            copy.deepcopy(components.unet), specs, seed=3, precision=precision, autocast=autocast
        ).to("cpu")
    generator = torch.Generator().manual_seed(5)
    for role in specs:
        for weight in unet.parameters_of(role):
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return unet


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        ("bf16", 0.03),  # 8 bits of mantissa through some 60 layers
        ("fp16", 0.03),  # stored in fp16, computed in bf16
        pytest.param("8bit", 0.05, marks=with_bitsandbytes),
        pytest.param("4bit", 0.30, marks=with_bitsandbytes),  # 9% per layer
    ],
)
def test_every_precision_computes_nearly_the_same_and_trains_float32_adapters(
    shared_components, make_inputs, precision, limit
):
    exact = shared_unet(shared_components, "fp32", autocast=None)
    unet = shared_unet(shared_components, precision)
    with torch.no_grad(), exact.role(STUDENT):
        expected = exact(*make_inputs())
    with unet.role(STUDENT):
        found = unet(*make_inputs())
        assert found.dtype == torch.float32
        assert 1e-5 < relative_error(found.detach(), expected) < limit
        (found.square().mean() + unet.features(*make_inputs())[0].square().mean()).backward()
    for weight in unet.parameters_of(STUDENT):
        assert weight.dtype == weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 0


@with_bitsandbytes
@pytest.mark.parametrize(("precision", "dtype"), [("8bit", torch.int8), ("4bit", torch.uint8)])
def test_quantised_layers_are_those_of_the_transformer_blocks(
    shared_components, make_inputs, precision, dtype
):
    unet = shared_unet(shared_components, precision)
    with torch.no_grad():
        unet(*make_inputs())
    weight = unet.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.base_layer
    assert weight.weight.dtype == dtype
    assert unet.unet.time_embedding.linear_1.weight.dtype == torch.bfloat16
    assert unet.unet.down_blocks[0].resnets[0].conv1.base_layer.weight.dtype == torch.bfloat16
    assert len(unet.modules_with_adapter) == 129  # peft knows these layers


def test_autocast_is_in_every_pass_and_a_rollout_does_not_take_the_gradients(
    shared_components, make_inputs
):
    """Autocast caches cast weights; one cast under no_grad carries no gradient (older torch)."""
    unet = shared_unet(shared_components, "fp32")
    dtypes = set()
    layer = unet.unet.mid_block.attentions[0].proj_in
    hook = layer.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), unet.role(STUDENT):
        with torch.no_grad():
            unet(*make_inputs())
        unet(*make_inputs()).square().mean().backward()
        unet.features(*make_inputs())
    hook.remove()
    assert dtypes == {torch.bfloat16}
    assert all(weight.grad.abs().max() > 0 for weight in unet.parameters_of(STUDENT))


@pytest.mark.parametrize(
    ("device", "mixed", "chosen", "expected"),
    [
        ("cpu", "bf16", "auto", "fp32"),
        ("cuda", "bf16", "auto", "bf16"),
        ("cuda", "no", "auto", "fp32"),
        ("cuda", "bf16", "4bit", "4bit"),
    ],
)
def test_the_base_follows_the_device(tmp_path, device, mixed, chosen, expected):
    config = demo_config(tmp_path, training__mixed_precision=mixed, model__base_precision=chosen)
    assert base_precision(config, torch.device(device)) == expected


def test_what_the_hardware_or_the_installation_cannot_do_is_one_sentence(monkeypatch):
    monkeypatch.setattr("train_lora.models.precision.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'"4bit" needs the library bitsandbytes.*pip install'):
        check_precision("4bit", torch.device("cpu"), "model.base_precision")
    check_precision("bf16", torch.device("mps"), "model.base_precision")
    monkeypatch.setattr("train_lora.models.precision.find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r'"8bit", which bitsandbytes cannot do on mps: set it'):
        check_precision("8bit", torch.device("mps"), "model.base_precision")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 7.5 .* has 7\.0"):
        check_precision("8bit", torch.device("cuda"), "model.base_precision")


# The optimizer


def quadratic(name: str) -> torch.Tensor:
    """Fifty steps towards zero from ones, on a tensor large enough for 8-bit states."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = build_optimizer(name, [([weight], 1e-2)], betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(50):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    return weight.detach()


@with_bitsandbytes
def test_eight_bit_states_follow_adamw():
    expected, found = quadratic("adamw"), quadratic("adamw8bit")
    assert expected.abs().max() < 0.7
    assert relative_error(found, expected) < 0.05


def test_groups_keep_their_learning_rates():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = build_optimizer(
        "adamw", [([a], 1e-3), ([b], 2e-3)], betas=(0.9, 0.99), weight_decay=0.1
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-3]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


# torch.compile


@pytest.mark.filterwarnings("ignore")  # dynamo looks at .grad and warns itself
def test_compiled_blocks_compute_the_same_in_every_role(shared_components, make_inputs):
    """dynamo's tracing and guards, with a backend that runs the traced graph as it is."""
    specs = {STUDENT: LoraSpec(rank=2, alpha=2), CRITIC: FullSpec()}
    results = []
    for compiled in (False, True):
        unet = shared_unet(shared_components, "fp32", autocast=None, specs=specs)
        if compiled:
            unet.compile_blocks(backend="eager")
            unet.enable_gradient_checkpointing()
        found = []
        with torch.no_grad():
            for role in (*unet.roles, STUDENT):
                with unet.role(role):
                    found.append(unet(*make_inputs()))
        with unet.role(STUDENT):
            unet(*make_inputs()).square().mean().backward()
        results.append(found + [weight.grad for weight in unet.parameters_of(STUDENT)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    block = unet.unet.mid_block.attentions[0].transformer_blocks[0]
    assert block._compiled_call_impl is not None


@with_bitsandbytes
def test_bitsandbytes_comes_without_download_and_without_complaint(tmp_path: Path) -> None:
    """diffusers and peft import it unasked; on a CPU with bf16 instructions it then uses `kernels`
    to fetch code from the hub, or complains that it cannot. The one here says when it is used."""
    (tmp_path / "kernels.py").write_text("import sys\nprint('used', file=sys.stderr)\n")
    code = (
        "import sys\n"
        "from train_lora.models.precision import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules\n"
        "print('imported', file=sys.stderr)\n"
        "import kernels\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["imported", "used"]
