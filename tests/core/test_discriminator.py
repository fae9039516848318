"""The head's shape for every map size, its values, and its initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2_core import MiddleBlockHead
from dmd2_core.discriminator import num_groups


def features(batch: int, channels: int, *size: int) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def test_sdxl_head_is_the_papers() -> None:
    with torch.device("meta"):  # shapes only: the real one has 105M parameters
        head = MiddleBlockHead(1280, 32)
        convolutions = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
        norms = [module for module in head.modules() if isinstance(module, nn.GroupNorm)]
        assert head(torch.empty(2, 1280, 32, 32)).shape == (2,)
    assert [conv.stride[0] for conv in convolutions] == [2, 2, 2, 4, 1]
    assert [conv.kernel_size[0] for conv in convolutions] == [4, 4, 4, 4, 1]
    assert [norm.num_groups for norm in norms] == [32] * 4
    assert convolutions[-1].out_channels == 1


@pytest.mark.parametrize(("size", "num_halvings"), [(4, 0), (8, 1), (16, 2), (32, 3)])
def test_values_for_every_map_size(size: int, num_halvings: int) -> None:
    head = MiddleBlockHead(96, size, generator=torch.Generator().manual_seed(1))
    x = features(3, 96, size, size)
    state = {name: value for name, value in head.state_dict().items() if value.ndim == 4}
    hidden = x
    weights = list(state)
    for i, name in enumerate(weights[:-1]):
        stride, padding = (2, 1) if i < num_halvings else (4, 0)
        bias = head.state_dict()[name.replace("weight", "bias")]
        hidden = F.conv2d(hidden, state[name], bias, stride=stride, padding=padding)
        grouped = hidden.view(3, 6, -1)  # 96 channels: 6 groups of 16
        grouped = grouped - grouped.mean(2, keepdim=True)
        grouped = grouped / (grouped.square().mean(2, keepdim=True) + 1e-5).sqrt()
        hidden = grouped.view_as(hidden)
        hidden = hidden * torch.sigmoid(hidden)
    assert len(weights) == num_halvings + 2
    assert hidden.shape == (3, 96, 1, 1)
    final = head.state_dict()["logit.bias"]
    expected = (hidden.flatten(1) * state[weights[-1]].flatten()).sum(1) + final
    # float32 through at most four normalised stages.
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)
    assert head(x).dtype == torch.float32


def test_logits_differ_and_carry_gradients() -> None:
    head = MiddleBlockHead(96, 4, generator=torch.Generator().manual_seed(2))
    x = features(8, 96, 4, 4).requires_grad_()
    logits = head(x)
    # A GroupNorm with one channel per group on a 1x1 map would make them all equal.
    assert logits.std() > 0.05
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


def test_narrow_features_still_give_float32_logits() -> None:
    head = MiddleBlockHead(64, 8, generator=torch.Generator().manual_seed(3))
    x = features(2, 64, 8, 8)
    # Only the features are rounded to bf16 (2^-9); normalised stages keep that size.
    torch.testing.assert_close(head(x.bfloat16()), head(x), rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.float32


@pytest.mark.parametrize("size", [(26, 38), (38, 26), (20, 48), (40, 40)])
def test_aspect_buckets_fit_the_same_head(size: tuple[int, int]) -> None:
    head = MiddleBlockHead(32, 32)
    logits = head(features(2, 32, *size))
    assert logits.shape == (2,)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1280, 32), (768, 32), (320, 20), (96, 6), (40, 2), (16, 1), (7, 1)]
)
def test_groups_divide_and_are_wide(channels: int, groups: int) -> None:
    assert num_groups(channels) == groups


@pytest.mark.parametrize("size", [0, 2, 6, 12, 33])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size is {size}: .* 4, 8, 16, 32"):
        MiddleBlockHead(32, size)


def test_generator_makes_it_reproducible_with_torchs_distribution() -> None:
    first = MiddleBlockHead(64, 8, generator=torch.Generator().manual_seed(4)).state_dict()
    second = MiddleBlockHead(64, 8, generator=torch.Generator().manual_seed(4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    default = MiddleBlockHead(64, 8).state_dict()
    for name, value in first.items():
        if value.numel() > 10_000:
            # Standard deviations of 65536 uniform values: relative standard error 0.2%.
            torch.testing.assert_close(value.std(), default[name].std(), rtol=0.01, atol=0)
            bound = 1 / (64 * 16) ** 0.5
            assert value.abs().max() <= bound
