"""LoRA files: read in full by diffusers and by us, equal bytes, clear refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd2_core import Recipe
from train_lora.export import export_lora, load_lora_into, read_lora, shared_unet_with_lora
from train_lora.models.names import kohya_names
from train_lora.models.roles import CRITIC, STUDENT, LoraSpec, SharedUNet

RECIPE = Recipe(timesteps=(999, 749, 499, 249), base_model="tiny", base_model_hash="ab")


def trained(unet, rank: int = 4, alpha: float = 2.0, seed: int = 1) -> SharedUNet:
    """A SharedUNet whose student is away from its zero start."""
    shared = SharedUNet(unet, {STUDENT: LoraSpec(rank=rank, alpha=alpha)}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in shared.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=generator)
    return shared


def output(shared: SharedUNet, inputs) -> torch.Tensor:
    with torch.no_grad(), shared.role(STUDENT):
        return shared(*inputs)


@pytest.fixture(scope="module")
def student(shared_components) -> SharedUNet:
    """For tests that only read it."""
    return trained(copy.deepcopy(shared_components.unet))


@pytest.fixture(scope="module")
def other_student(shared_components) -> SharedUNet:
    """For LoRAs that must not get into it."""
    return trained(copy.deepcopy(shared_components.unet), seed=7)


@pytest.fixture
def base(shared_components):
    """A second copy of the base UNet."""
    return copy.deepcopy(shared_components.unet)


@pytest.fixture
def path(tmp_path, student):
    export_lora(student, STUDENT, tmp_path / "l.safetensors", RECIPE, dtype=torch.float32)
    return tmp_path / "l.safetensors"


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# Writing


def test_names_values_and_alphas(student, path):
    tensors = load_file(path)
    assert len(tensors) == 3 * 129 == 3 * len(student.modules_with_adapter)
    values = {module: (down, up) for module, down, up in student.pairs_of(STUDENT)}
    for name, module in {
        "lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "lora_unet_input_blocks_4_0_op": "down_blocks.1.downsamplers.0.conv",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0": (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
        "lora_unet_output_blocks_5_0_skip_connection": "up_blocks.2.resnets.1.conv_shortcut",
    }.items():
        down, up = values[module]
        assert torch.equal(tensors[name + ".lora_down.weight"], down)
        assert torch.equal(tensors[name + ".lora_up.weight"], up)
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert all(alpha.item() == 2.0 and alpha.shape == () for alpha in alphas)


def test_float16_is_the_default_and_rounds_weights_only(tmp_path, components):
    student = trained(components.unet, rank=3, alpha=0.7)
    export_lora(student, STUDENT, tmp_path / "l.safetensors", RECIPE)
    tensors = load_file(tmp_path / "l.safetensors")
    names = kohya_names(student.modules_with_adapter, components.unet.config)
    for module, down, up in student.pairs_of(STUDENT):
        assert torch.equal(tensors[names[module] + ".lora_down.weight"], down.half())
        assert torch.equal(tensors[names[module] + ".lora_up.weight"], up.half())
    weights = {t.dtype for name, t in tensors.items() if name.endswith("weight")}
    assert weights == {torch.float16}
    alpha = tensors["lora_unet_input_blocks_1_0_in_layers_2.alpha"]
    assert alpha.dtype == torch.float32
    assert alpha.item() == pytest.approx(0.7, rel=1e-7)  # float16 would be off by 3e-4


def test_metadata_tells_the_recipe_and_what_other_programs_ask(path):
    found = metadata(path)
    recipe = Recipe.from_metadata(found)
    assert recipe.timesteps == (999, 749, 499, 249)
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.base_model) == (4, 2.0, "tiny")
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2.0"}
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.title"] == "tiny, DMD2 in 4 steps"


def test_equal_weights_give_equal_bytes(student, path, tmp_path):
    export_lora(student, STUDENT, tmp_path / "other.safetensors", RECIPE, dtype=torch.float32)
    assert path.read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.safetensors", "other.safetensors"]


def test_overwriting_must_be_asked_for(student, path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists: choose another name or allow overwriting"):
        export_lora(student, STUDENT, path, RECIPE)
    assert path.read_bytes() == before
    export_lora(student, STUDENT, path, RECIPE, overwrite=True)
    assert len(path.read_bytes()) < len(before)  # float16 now


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_weights_that_are_not_finite_are_refused(components, tmp_path, value):
    student = trained(components.unet)
    student.parameters_of(STUDENT)[3].data[0] = value  # 1e5 is too large for float16
    with pytest.raises(ValueError, match="1 tensors of the LoRA are not finite"):
        export_lora(student, STUDENT, tmp_path / "l.safetensors", RECIPE)
    assert not list(tmp_path.iterdir())


# Reading


@pytest.mark.parametrize("names", ["sd-scripts", "diffusers"])
def test_diffusers_applies_every_module(student, tmp_path, base, components, make_inputs, names):
    path = tmp_path / "l.safetensors"
    export_lora(student, STUDENT, path, RECIPE, dtype=torch.float32, names=names)
    pipeline = StableDiffusionXLPipeline(
        vae=components.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=base,
        scheduler=None,
        add_watermarker=False,
    )
    assert isinstance(pipeline, LoraBaseMixin)
    pipeline.load_lora_weights(str(path))
    layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == len(student.modules_with_adapter)
    x_t, t, condition = make_inputs()
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    with torch.no_grad():
        found = base(x_t, t, condition.hidden, added_cond_kwargs=added).sample
    # The same layers in the same order: only the factor alpha / rank may be applied elsewhere.
    torch.testing.assert_close(found, output(student, make_inputs()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 2.0), (3, 0.7), (2, 16.0)])
def test_round_trip_is_exact_for_any_alpha(tmp_path, components, base, make_inputs, rank, alpha):
    student = trained(components.unet, rank, alpha)
    export_lora(student, STUDENT, tmp_path / "l.safetensors", RECIPE, dtype=torch.float32)
    other = SharedUNet(base, {STUDENT: LoraSpec(rank=rank, alpha=alpha)}, seed=7)
    recipe = load_lora_into(other, tmp_path / "l.safetensors")
    assert recipe.lora_alpha == alpha
    assert all(map(torch.equal, other.parameters_of(STUDENT), student.parameters_of(STUDENT)))
    assert torch.equal(output(other, make_inputs()), output(student, make_inputs()))


def test_a_plain_unet_takes_the_files_rank_and_alpha(student, path, base, make_inputs):
    other, recipe = shared_unet_with_lora(base, path)
    assert other.adapters[STUDENT] == LoraSpec(rank=4, alpha=2.0)
    assert recipe == Recipe.from_metadata(metadata(path))
    assert torch.equal(output(other, make_inputs()), output(student, make_inputs()))


def test_a_larger_role_with_another_alpha_computes_the_same(student, path, base, make_inputs):
    specs = {STUDENT: LoraSpec(rank=6, alpha=9), CRITIC: LoraSpec(rank=4, alpha=1)}
    other = SharedUNet(base, specs, seed=7)
    before = [weight.detach().clone() for weight in other.parameters_of(CRITIC)]
    load_lora_into(other, path)
    torch.testing.assert_close(
        output(other, make_inputs()), output(student, make_inputs()), atol=2e-5, rtol=0
    )  # sums of 6 products instead of 4, through 129 layers
    assert all(map(torch.equal, other.parameters_of(CRITIC), before))
    assert all(weight.requires_grad for weight in other.parameters_of(STUDENT))


def test_diffusers_module_names_and_a_missing_alpha_are_read(student, tmp_path, base, make_inputs):
    """The form of the published DMD2 LoRA; without alpha the factor is 1."""
    tensors = {}
    for module, down, up in student.pairs_of(STUDENT):
        name = "lora_unet_" + module.replace(".", "_")
        tensors[name + ".lora_down.weight"] = down.detach()
        tensors[name + ".lora_up.weight"] = up.detach() * (2 / 4)
    save_file(tensors, tmp_path / "l.safetensors")
    other, recipe = shared_unet_with_lora(base, tmp_path / "l.safetensors")
    assert recipe is None
    torch.testing.assert_close(
        output(other, make_inputs()), output(student, make_inputs()), atol=1e-5, rtol=0
    )


# Refusals


def changed(path, tmp_path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


FIRST = "lora_unet_input_blocks_1_0_emb_layers_1"


def with_wrong_shape(tensors):
    tensors[FIRST + ".lora_down.weight"] = torch.zeros(4, 1280)


def with_unknown_module(tensors):
    for end in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"lora_unet_input_blocks_7_1_proj_in.{end}"] = tensors.pop(f"{FIRST}.{end}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_wrong_shape, rf"1 of its 129 modules do not fit, first {FIRST} \(sizes \[4, 1280\]"),
        (with_unknown_module, r"first lora_unet_input_blocks_7_1_proj_in \(no such module\)"),
        (lambda t: t.pop(FIRST + ".lora_up.weight"), f"no {FIRST}.lora_up.weight"),
        (lambda t: t.update({"x.dora_scale": torch.ones(1)}), "it holds x.dora_scale"),
        (lambda t: t[FIRST + ".alpha"].fill_(float("inf")), f"damaged tensors in {FIRST}"),
        (lambda t: t.update({FIRST + ".lora_up.weight": torch.ones(5)}), "damaged tensors"),
    ],
)
def test_loras_that_do_not_fit_are_refused(path, tmp_path, other_student, change, message):
    bad = changed(path, tmp_path, change)
    before = [weight.detach().clone() for weight in other_student.parameters_of(STUDENT)]
    with pytest.raises(ValueError, match=message) as caught:
        load_lora_into(other_student, bad)
    assert str(bad) in str(caught.value)
    assert all(map(torch.equal, other_student.parameters_of(STUDENT), before))


def test_a_larger_rank_than_the_roles_is_refused(path, base):
    other = SharedUNet(base, {STUDENT: LoraSpec(rank=2, alpha=1)}, seed=7)
    with pytest.raises(ValueError, match="has rank 4, the student only 2: set the student's rank"):
        load_lora_into(other, path)


def test_a_file_that_is_no_lora_is_refused(tmp_path):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"not a plain LoRA \(it has no .lora_down.weight"):
        read_lora(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not exist: check the path"):
        read_lora(tmp_path / "nothing.safetensors")
