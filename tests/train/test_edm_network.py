"""The EDM network against diffusers' ADM, its published size, and that it learns."""

import re

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from dmd2_core import (
    Denoiser,
    EDMSchedule,
    MiddleBlockHead,
    SteppedSchedule,
    StepPlan,
    add_noise,
    coefficients,
    denoising_loss,
    edm_loss_weight,
    edm_scalings,
    few_step_sample,
    initial_sample,
)
from train_lora.models.edm_network import (
    EDMNetwork,
    infer_config,
    load_edm,
    metadata_of,
    parameter_shapes,
)
from train_lora.models.edm_unet import EDMConfig, EDMUNet
from train_lora.models.safetensors_io import write_safetensors

SMALL = EDMConfig(
    resolution_px=8,
    classes=3,
    width=32,
    width_factors=(1, 2),
    blocks=1,
    attention_px=(4,),
    head_channels=32,
)


def random_network(config: EDMConfig) -> EDMNetwork:
    """Every weight random, those that start at zero too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EDMNetwork(config)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.05)
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.normal_(module.weight, mean=1.0, std=0.1)
    return network.eval().requires_grad_(False)


def to_diffusers(state: dict[str, Tensor], heads: dict[str, int]) -> dict[str, Tensor]:
    """An `EDMUNet` of two levels with one block each, attention in the lower, as UNet2DModel's."""
    blocks = {
        "enc.8x8_block0": ("down_blocks.0.resnets.0", ""),
        "enc.4x4_down": ("down_blocks.0.downsamplers.0", ""),
        "enc.4x4_block0": ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0"),
        "dec.4x4_in0": ("mid_block.resnets.0", "mid_block.attentions.0"),
        "dec.4x4_in1": ("mid_block.resnets.1", ""),
        "dec.4x4_block0": ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
        "dec.4x4_block1": ("up_blocks.0.resnets.1", "up_blocks.0.attentions.1"),
        "dec.8x8_up": ("up_blocks.0.upsamplers.0", ""),
        "dec.8x8_block0": ("up_blocks.1.resnets.0", ""),
        "dec.8x8_block1": ("up_blocks.1.resnets.1", ""),
    }
    parts = {
        "norm0": "norm1",
        "conv0": "conv1",
        "affine": "time_emb_proj",
        "norm1": "norm2",
        "conv1": "conv2",
        "skip": "conv_shortcut",
    }
    rest = {
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        "enc.8x8_conv": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    theirs = {"class_embedding.weight": state["map_label.weight"].t()}
    for name, value in state.items():
        module, kind = name.rsplit(".", 1)
        block, _, part = module.rpartition(".")
        if module in rest:
            theirs[f"{rest[module]}.{kind}"] = value
        elif part in parts:
            theirs[f"{blocks[block][0]}.{parts[part]}.{kind}"] = value
        elif part == "norm2":
            theirs[f"{blocks[block][1]}.group_norm.{kind}"] = value
        elif part == "proj":
            theirs[f"{blocks[block][1]}.to_out.0.{kind}"] = (
                value.flatten(1) if value.ndim > 1 else value
            )
        elif part == "qkv":  # channels in the order (head, channel of the head, q k v)
            width = len(value) // 3
            split = value.reshape(heads[block], width // heads[block], 3, -1)
            for index, which in enumerate("qkv"):
                rows = split[:, :, index].reshape(width, -1)
                theirs[f"{blocks[block][1]}.to_{which}.{kind}"] = (
                    rows if value.ndim > 1 else rows[:, 0]
                )
    return theirs


def test_the_network_is_the_adm_of_diffusers() -> None:
    """diffusers builds ADM for the ImageNet-64 consistency models: an independent reference."""
    config = EDMConfig(
        resolution_px=8,
        classes=3,
        width=128,  # diffusers' norms have 32 groups at any width, ours from 128 channels on
        width_factors=(1, 2),
        blocks=1,
        attention_px=(4,),
        head_channels=64,
    )
    ours = random_network(config).model
    theirs = UNet2DModel(
        sample_size=8,
        block_out_channels=(128, 256),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=64,
        attn_norm_num_groups=32,  # else its middle attention has no norm
        num_class_embeds=3,
    ).eval()
    heads = {name.removesuffix(".qkv"): 4 for name, _ in ours.named_modules() if "qkv" in name}
    theirs.load_state_dict(to_diffusers(ours.state_dict(), heads))
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([-1.5, 0.0, 1.1])
    labels = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = theirs(x, noise, class_labels=labels).sample
        got = ours(x, noise, labels)
    assert expected.std() > 0.1
    # float32 through 10 blocks, attention summed in another order.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_full_size_has_the_published_names_shapes_and_parameters() -> None:
    """Of edm-imagenet-64x64-cond-adm: 296M parameters (EDM, table 7)."""
    shapes = parameter_shapes(EDMConfig())
    assert sum(shape.numel() for shape in shapes.values()) == 295_899_267
    expected = {
        "model.map_layer0.weight": (768, 192),
        "model.map_layer1.bias": (768,),
        "model.map_label.weight": (768, 1000),
        "model.enc.64x64_conv.weight": (192, 3, 3, 3),
        "model.enc.64x64_block2.conv1.weight": (192, 192, 3, 3),
        "model.enc.32x32_down.conv0.weight": (192, 192, 3, 3),
        "model.enc.32x32_block0.skip.weight": (384, 192, 1, 1),
        "model.enc.32x32_block0.qkv.weight": (1152, 384, 1, 1),
        "model.enc.8x8_block2.affine.weight": (1536, 768),
        "model.dec.8x8_in0.proj.weight": (768, 768, 1, 1),
        "model.dec.8x8_in1.norm1.weight": (768,),
        "model.dec.8x8_block0.norm0.weight": (1536,),
        "model.dec.8x8_block3.conv0.weight": (768, 1344, 3, 3),
        "model.dec.64x64_up.conv0.weight": (384, 384, 3, 3),
        "model.dec.64x64_block3.skip.weight": (192, 384, 1, 1),
        "model.out_norm.weight": (192,),
        "model.out_conv.bias": (3,),
    }
    assert {name: tuple(shapes[name]) for name in expected} == expected
    assert not any("64x64" in name and "qkv" in name for name in shapes)
    assert not any("in1.qkv" in name or "down.skip" in name for name in shapes)
    assert infer_config(shapes, {}) == EDMConfig()


def test_a_file_gives_back_the_network(tmp_path) -> None:
    network = random_network(SMALL)
    write_safetensors(tmp_path / "edm.safetensors", network.state_dict(), metadata_of(SMALL))
    again = load_edm(tmp_path / "edm.safetensors")
    assert again.config == SMALL
    x, sigma, labels = torch.ones(2, 3, 8, 8), torch.tensor([0.1, 80.0]), torch.tensor([0, 2])
    assert torch.equal(again(x, sigma, labels), network(x, sigma, labels))
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.enc.8x8_conv.weight"), "is no EDM network"),
        (
            lambda s: s.update({"model.enc.8x8_conv.weight": torch.ones(32)}),
            r"8x8_conv\.weight has shape \(32,\), which no EDM network has",
        ),
        (lambda s: s.pop("model.out_conv.bias"), r"model\.out_conv\.bias is missing"),
        (
            lambda s: s.update({"model.dec.8x8_aux_norm.weight": torch.ones(32)}),
            r"8x8_aux_norm\.weight belongs to another architecture",
        ),
        (
            lambda s: s.update({"model.out_conv.bias": torch.ones(4)}),
            r"out_conv\.bias has shape \(4,\), not \(3,\)",
        ),
    ],
)
def test_another_file_is_refused(tmp_path, change, message) -> None:
    state = random_network(SMALL).state_dict()
    change(state)
    write_safetensors(tmp_path / "edm.safetensors", state, metadata_of(SMALL))
    with pytest.raises(ValueError, match=f"edm.safetensors: .*{message}"):
        load_edm(tmp_path / "edm.safetensors")


def test_features_are_the_middle_block_of_the_same_pass() -> None:
    network = random_network(SMALL)
    x_t, sigma, labels = torch.ones(2, 3, 8, 8), torch.tensor([0.5, 80.0]), torch.tensor([0, 2])
    seen: list[Tensor] = []
    middle = network.model.dec["4x4_in1"]
    handle = middle.register_forward_hook(lambda module, args, output: seen.append(output))
    network(x_t, sigma, labels)
    handle.remove()
    features = network.features(x_t, sigma, labels)
    assert features.shape == (2, SMALL.feature_channels, SMALL.feature_px, SMALL.feature_px)
    assert torch.equal(features, seen[0])
    head = MiddleBlockHead(SMALL.feature_channels, SMALL.feature_px)
    assert head(features).shape == (2,)


def test_a_new_network_only_scales_its_input() -> None:
    """F is zero at first, so D = c_skip * x (EDM, eq. 7)."""
    x_t, sigma = torch.full((2, 3, 8, 8), 3.0), torch.tensor([0.5, 80.0], dtype=torch.float64)
    denoised = EDMNetwork(SMALL)(x_t, sigma, torch.tensor([0, 1]))
    expected = edm_scalings(sigma).skip.view(2, 1, 1, 1) * x_t
    assert torch.equal(denoised, expected.float())


def test_labels_must_fit_the_network() -> None:
    x_t, sigma = torch.ones(1, 3, 8, 8), torch.ones(1)
    with pytest.raises(ValueError, match="3 classes, but labels is missing"):
        EDMNetwork(SMALL)(x_t, sigma, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 48}, "width is 48: choose a multiple of 32"),
        ({"resolution_px": 60}, "resolution_px is 60, which cannot be halved 3 times"),
        ({"attention_px": (7,)}, "attention_px has 7, but the levels have"),
        ({"head_channels": 100}, "head_channels is 100, which does not divide"),
        ({"blocks": 0}, "at least one level and one block"),
    ],
)
def test_impossible_sizes_are_refused(values, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EDMConfig(**values)


def test_it_learns_to_denoise_by_class() -> None:
    """Three kinds of pictures, told apart by their label alone at the highest noise.

    Baseline: the best denoiser that knows the data's mean (0) and deviation but no picture, which
    is D = c_skip * x; its weighted loss is 1 by EDM's scaling.
    """
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 8).expand(3, 8, 8)
    ramp = ramp * 0.5 / ramp.std(unbiased=False)
    pictures = torch.stack([ramp, ramp.transpose(1, 2), -ramp])
    network = EDMNetwork(SMALL)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule, draws = EDMSchedule(), torch.Generator().manual_seed(1)

    def loss_of(count: int) -> Tensor:
        labels = torch.randint(3, (count,), generator=draws)
        sigma = SteppedSchedule.edm().time(torch.randint(1000, (count,), generator=draws))
        x0, eps = pictures[labels], torch.randn(count, 3, 8, 8, generator=draws)
        output = network(add_noise(schedule, x0, eps, sigma), sigma, labels)
        alpha, wide = coefficients(schedule, sigma, x0)
        weight = edm_loss_weight(sigma)
        return denoising_loss("sample", output, x0, eps, alpha, wide, weight)

    with torch.no_grad():
        # 256 draws of chi-square means over 192 values: within 0.05 of 1.
        assert loss_of(256).item() == pytest.approx(1.0, abs=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(16).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_of(256).item() < 0.5  # 0.37 when this was written
        plan = StepPlan(timesteps=(80.0,))  # one step, from noise: it must go by the label
        denoiser = Denoiser(network, schedule, "sample")
        labels = torch.arange(3)
        start = initial_sample(schedule, plan, torch.randn(3, 3, 8, 8, generator=draws))
        made = few_step_sample(
            lambda x, t: denoiser(x, t, labels),
            start,
            schedule,
            plan,
            noise=lambda index, like: torch.zeros_like(like),
        )
    distances = torch.cdist(made.flatten(1), pictures.flatten(1))
    assert torch.equal(distances.argmin(dim=1), labels)
    # A picture of zeros is 0.5 * sqrt(192) = 6.9 away; 0.9 when this was written.
    assert distances.diagonal().max() < 0.25 * 6.9


def test_published_names_hold_no_buffers() -> None:
    assert not list(EDMUNet(SMALL).buffers())
