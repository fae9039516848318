"""LPIPS, CLIP score, Inception features, precision and recall against other implementations.

The networks have random weights of their true structure: what is compared is the computation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from torchmetrics.functional.image.lpips import _LPIPS
from transformers import CLIPModel, CLIPProcessor

from train_lora.metrics.clip import PREFIX, load_clip
from train_lora.metrics.features import load_extractor
from train_lora.metrics.lpips import load_lpips
from train_lora.metrics.picture_folder import pixels, scaled_to, square
from train_lora.metrics.precision_recall import precision_recall
from train_lora.metrics.weights import read_weights

from .metric_files import alexnet_file, clip_folder, random_picture, vgg16_file

CPU = torch.device("cpu")


@pytest.mark.parametrize(("net", "file"), [("alex", alexnet_file), ("vgg", vgg16_file)])
def test_lpips_is_torchmetrics(net: str, file: Callable[[Path], Path], tmp_path: Path) -> None:
    path = file(tmp_path)
    ours = load_lpips(path)
    theirs = _LPIPS(pretrained=True, net=net, pnet_rand=True)
    weights = torch.load(path, weights_only=True)
    for stage in (
        theirs.net.slice1,
        theirs.net.slice2,
        theirs.net.slice3,
        theirs.net.slice4,
        theirs.net.slice5,
    ):
        stage.load_state_dict({name: weights[f"features.{name}"] for name in stage.state_dict()})
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 72, 64, generator=generator) * 2 - 1
    expected = theirs(images[:2], images[2:]).flatten()
    assert expected.min() > 0.01
    # The same sums in another order, in float32.
    assert torch.allclose(ours(images[:2], images[2:]), expected, rtol=1e-5)
    assert ours(images, images).abs().max() == 0
    pairs = [
        theirs(images[i : i + 1], images[j : j + 1]) for i in range(3) for j in range(i + 1, 3)
    ]
    assert ours.diversity(images[:3]) == pytest.approx(float(torch.cat(pairs).mean()), rel=1e-5)


def test_lpips_gives_gradients_to_pictures_alone(tmp_path: Path) -> None:
    network = load_lpips(alexnet_file(tmp_path))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=generator).requires_grad_()
    network(images[:1], images[1:]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def share_among(vectors: np.ndarray, others: np.ndarray) -> float:
    """By scipy's trees: how many lie in the ball around some other, up to its third neighbour."""
    tree = KDTree(others)
    radii = tree.query(others, k=4)[0][:, 3]  # the nearest is itself
    inside = [bool((np.linalg.norm(others - vector, axis=1) <= radii).any()) for vector in vectors]
    return float(np.mean(inside))


def test_precision_and_recall_are_those_of_scipys_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(150, 6, generator=generator, dtype=torch.float64) * 0.7
    real = torch.randn(220, 6, generator=generator, dtype=torch.float64) + 0.3
    precision, recall = precision_recall(made, real)
    a, b = made.numpy(), real.numpy()
    assert (precision, recall) == pytest.approx((share_among(a, b), share_among(b, a)), abs=1e-9)
    assert precision > recall + 0.1  # narrower than the real ones: the two differ
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_inception_is_read_from_a_file_without_unpickling_it(tmp_path: Path) -> None:
    """As torch-fidelity's own extractor on the same file; that one accepts any pickle."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    blank = object.__new__(FeatureExtractorInceptionV3)  # its structure, before weights are read
    with pytest.raises(FileNotFoundError), torch.device("meta"):
        blank.__init__("blank", ["2048"], str(tmp_path / "none.pth"))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in blank.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            weights[name] = torch.ones(value.shape)
        elif value.ndim > 1:
            deviation = (2 / value[0].numel()) ** 0.5  # keeps the signal's size
            weights[name] = torch.randn(value.shape, generator=generator) * deviation
        else:
            weights[name] = torch.zeros(value.shape, dtype=value.dtype)
    path = tmp_path / "inception.pth"
    torch.save(weights, path)
    extractor = load_extractor(str(path), CPU)
    batch = torch.stack([pixels(scaled_to(square(random_picture(0), None), extractor.side_px))])
    features = extractor.features(batch)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(path))
    assert torch.equal(features, theirs(batch)[0])
    assert features.shape == (1, extractor.width)
    assert features.std() > 0


class _Plain(CLIPModel):
    """What torchmetrics 1.9 expects of a CLIP model: transformers 5 wraps the features."""

    def get_image_features(self, *arguments, **options):
        return super().get_image_features(*arguments, **options).pooler_output

    def get_text_features(self, *arguments, **options):
        return super().get_text_features(*arguments, **options).pooler_output


def test_clip_score_is_torchmetrics(tmp_path: Path) -> None:
    from torchmetrics.functional.multimodal import clip_score

    folder = clip_folder(tmp_path / "clip")
    captions = ["a red fox in snow", "an old sailor, portrait, oil on canvas"]
    pictures = [random_picture(3), random_picture(4, 64, 64)]
    ours = load_clip(str(folder), CPU).scores(pictures, captions)
    assert ours.shape == (2,)
    theirs_takes = _Plain.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    for picture, caption, score in zip(pictures, captions, ours.tolist(), strict=True):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what their library has to say is not ours to test
            theirs = clip_score(
                pixels(picture), PREFIX + caption, model_name_or_path=lambda: theirs_takes
            )
        # Theirs has a floor of 0 and counts to 100.
        assert max(score, 0) == pytest.approx(float(theirs) / 100, abs=1e-5)
    assert ours.max() > 0.01


def test_clip_from_the_hub_is_the_cached_one_or_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real cache layout; offline mode is on in every test."""
    repository = tmp_path / "models--org--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = clip_folder(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    picture = [random_picture(3)]
    ours = load_clip("hub:org/clip", CPU).scores(picture, ["a red fox"])
    assert torch.equal(ours, load_clip(str(folder), CPU).scores(picture, ["a red fox"]))
    (folder / "model.safetensors").unlink()  # as an interrupted download leaves it
    with pytest.raises(ValueError, match=r"org/clip' is not in the .* into a folder and name that"):
        load_clip("hub:org/clip", CPU)


def test_a_weights_file_may_hold_nothing_but_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(1), "extra": Path("x")}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_weights(path, "--lpips", "there")
    torch.save({"w": torch.zeros(1), "epoch": 3}, path)
    with pytest.raises(ValueError, match="not a table of tensors"):
        read_weights(path, "--lpips", "there")
    with pytest.raises(ValueError, match=r"Nothing is downloaded here: get it from there"):
        read_weights(tmp_path / "none.pth", "--lpips", "there")
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, path)
    with pytest.raises(ValueError, match="holds another network"):
        load_lpips(path)
