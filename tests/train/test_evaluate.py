"""`dmd2 evaluate` on folders and on a model: figures, what is resumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from dmd2_core import Recipe
from train_lora import cli, render
from train_lora.demo import scenes
from train_lora.demo.classifier import load_classifier
from train_lora.evaluate import Measures, Networks, evaluate, look
from train_lora.metrics import features
from train_lora.metrics.clip import load_clip
from train_lora.metrics.diversity import diversity
from train_lora.metrics.frechet import frechet_distance
from train_lora.metrics.looks import looks
from train_lora.metrics.lpips import load_lpips
from train_lora.metrics.picture_folder import middle, pixels, read_folder, square
from train_lora.metrics.precision_recall import precision_recall
from train_lora.pictures import to_picture

from .metric_files import alexnet_file, clip_folder
from .test_cli import failure
from .tiny import student_file

COUNT = 68
"""Pictures of a set: more than the classifier's 64 features, as FID needs."""


@pytest.fixture(scope="module")
def drawn() -> tuple[list[str], Tensor]:
    """Captions, each twice, and scenes of them (68, 3, 128, 128) as 8 bits hold them."""
    generator = torch.Generator().manual_seed(0)
    found = scenes.random_scenes(COUNT // 2, generator)
    images = scenes.draw([scene for scene in found for _ in range(2)], generator)
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    return [scene.caption for scene in found for _ in range(2)], rounded


def write_folder(folder: Path, images: Tensor, captions: list[str] | None) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        to_picture(image).save(folder / f"{number:03d}.png")
    if captions is not None:
        rows = [
            json.dumps({"file_name": f"{number:03d}.png", "text": text})
            for number, text in enumerate(captions)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_figures_of_a_folder_are_those_of_its_pixels(tmp_path, drawn, capsys) -> None:
    captions, images = drawn
    generator = torch.Generator().manual_seed(5)
    real = scenes.draw(scenes.random_scenes(COUNT, generator), generator)
    made = write_folder(tmp_path / "made", images, captions)
    reference = write_folder(tmp_path / "real", real, None)
    argv = ["evaluate", "--images", str(made), "--reference", str(reference)]
    argv += ["--features", "demo", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    classifier = load_classifier()
    with torch.no_grad():
        ours = classifier.features(images)
        theirs = classifier.features((((real + 1) * 127.5).round() / 127.5 - 1).clamp(-1, 1))
    precision, recall = precision_recall(ours, theirs)
    expected = {
        "fid": frechet_distance(ours, theirs),
        "precision": precision,
        "recall": recall,
        "feature_diversity": diversity(ours.view(COUNT // 2, 2, -1)),
        **looks(images),
    }
    assert report["figures"] == pytest.approx(expected, rel=1e-4)  # batches of 32: last bits
    assert list(report["left_out"]) == ["patch_fid"]
    assert (report["pictures"], report["prompts"]) == (COUNT, len(set(captions)))
    assert f"{expected['fid']:.4f}" in capsys.readouterr().out


class _ForTorchmetrics(torch.nn.Module):
    """The classifier as torchmetrics wants a network of one's own: bytes in, features out."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.network = load_classifier()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        return self.network.features(pictures.float() / 127.5 - 1)


def test_fid_and_patch_fid_of_two_folders_are_torchmetrics(tmp_path, drawn) -> None:
    """Larger pictures than the network's 128 px: FID sees them scaled, patch FID their middle."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(6)
    real = scenes.draw(scenes.random_scenes(COUNT, generator), generator)
    pictures = {}
    for name, images in (("made", drawn[1]), ("real", real)):
        (tmp_path / name).mkdir()
        pictures[name] = [to_picture(image).resize((190, 170)) for image in images]
        for number, picture in enumerate(pictures[name]):
            picture.save(tmp_path / name / f"{number:03d}.png")
    argv = ["evaluate", "--images", str(tmp_path / "made"), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--features", "demo", "--reference", str(tmp_path / "real")]) == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["figures"]

    def seen(picture: Image.Image, *, patch: bool) -> Tensor:
        box = (31, 21, 159, 149) if patch else (10, 0, 180, 170)
        cut = picture.crop(box).resize((128, 128), Image.Resampling.BICUBIC)
        return (
            torch.tensor(list(cut.tobytes()), dtype=torch.uint8).view(128, 128, 3).permute(2, 0, 1)
        )

    for figure, patch in (("fid", False), ("patch_fid", True)):
        theirs = FrechetInceptionDistance(feature=_ForTorchmetrics())
        for name in ("made", "real"):
            batch = torch.stack([seen(picture, patch=patch) for picture in pictures[name]])
            theirs.update(batch, real=name == "real")
        # The same features but for the batch's last bits; covariances of 68 rows, in float64.
        assert figures[figure] == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert abs(figures["fid"] - figures["patch_fid"]) > 0.1 * figures["fid"]


def test_clip_score_and_lpips_of_a_folder(tmp_path, drawn) -> None:
    """Captions lie beside the pictures here; all is measured at 64 px."""
    _, images = drawn
    folder = write_folder(tmp_path / "made", images[:5], None)
    captions = ["a", "b", "a", "b", "only one"]
    for number, caption in enumerate(captions):
        (folder / f"{number:03d}.txt").write_text(f"{caption}\n")
    clip, alexnet = clip_folder(tmp_path / "clip"), alexnet_file(tmp_path)
    argv = ["evaluate", "--images", str(folder), "--clip", str(clip), "--lpips", str(alexnet)]
    assert cli.main([*argv, "--resize-px", "64", "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["figures"]
    small = [square(to_picture(image), 64) for image in images[:5]]
    scores = load_clip(str(clip), torch.device("cpu")).scores(small, captions)
    assert figures["clip_score"] == pytest.approx(float(scores.mean()), abs=1e-6)
    scaled = torch.stack([pixels(picture) for picture in small]).float() / 127.5 - 1
    pairs = load_lpips(alexnet)(scaled[:2], scaled[2:4])
    assert figures["lpips_diversity"] == pytest.approx(float(pairs.mean()), rel=1e-5)
    assert "fid" not in figures
    (folder / "004.txt").unlink()
    with pytest.raises(ValueError, match=r"004\.png has no caption, but others"):
        evaluate(folder, Measures(), tmp_path / "out")


def test_patches_are_the_middle_at_full_resolution(tmp_path) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 170, 200, generator=generator) * 2 - 1
    folder = write_folder(tmp_path / "large", image[None], None)
    to_picture(image[:, :128]).save(folder / "too_small.png")
    extractor = features.load_extractor("demo", torch.device("cpu"))
    networks = Networks(extractor=extractor, clip=None, lpips=None)
    accelerator = Accelerator(cpu=True)
    seen = look(read_folder(folder, "x"), networks, Measures(), accelerator, "x")
    exact = to_picture(image)
    cut = pixels(exact)[:, 21:149, 36:164]
    assert torch.equal(seen.patches, extractor.features(cut[None]))
    assert len(seen.features) == 2
    assert not torch.allclose(seen.features[:1], seen.patches, atol=0.01)
    assert torch.equal(pixels(square(exact, None)), pixels(exact)[:, :, 15:185])
    assert torch.equal(pixels(middle(exact, 128)), cut)
    assert square(exact, 64).size == (64, 64)


def test_drawing_goes_on_where_it_stopped(tmp_path, tiny_teacher, monkeypatch, capsys) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\n\n a blue ring \n")
    lora = student_file(tmp_path / "lora.safetensors")
    out = tmp_path / "out"
    (out / "pictures").mkdir(parents=True)  # as a call leaves it that is killed at its start
    monkeypatch.setattr(render, "rows_at_once", lambda height, width: 2)
    argv = ["evaluate", "--model", "demo", "--lora", str(lora), "--prompts", str(prompts)]
    argv += ["--per-prompt", "2", "--seed", "7", "--features", "demo", "--out", str(out)]
    assert cli.main(argv) == 0
    first = (out / "metrics.json").read_bytes()
    pictures = {path.name: path.read_bytes() for path in (out / "pictures").glob("*.png")}
    assert sorted(pictures) == [f"{number:06d}.png" for number in range(4)]
    assert len(set(pictures.values())) == 4
    captions = read_folder(out / "pictures", "x").captions
    assert captions == ["a red disc"] * 2 + ["a blue ring"] * 2
    assert set(json.loads(first)["figures"]) >= {"feature_diversity", "brightness"}

    (out / "pictures" / "000003.png").unlink()
    drawn = []
    sample = render.sample_latents
    monkeypatch.setattr(
        render,
        "sample_latents",
        lambda *a, **k: drawn.append(k["first_index"]) or sample(*a, **k),
    )
    assert cli.main(argv) == 0
    assert drawn == [2]  # the batch that it belongs to, for equal bits, and no other
    again = {path.name: path.read_bytes() for path in (out / "pictures").glob("*.png")}
    assert [name for name in pictures if again[name] != pictures[name]] == []
    assert (out / "metrics.json").read_bytes() == first
    assert cli.main(argv) == 0
    assert drawn == [2]
    capsys.readouterr()
    error = failure(capsys, *[word if word != "7" else "8" for word in argv])
    assert "holds pictures of other settings (seed: 7, now 8)" in error


def test_teacher_and_student_draw_from_the_same_noise_with_their_own_samplers(
    tmp_path, tiny_teacher, monkeypatch
) -> None:
    calls = []
    sample = render.sample_latents

    def spy(unet, role, components, condition, plan, **options):
        calls.append((role, plan.timesteps, options["guidance"], options["strength"]))
        return sample(unet, role, components, condition, plan, **options)

    monkeypatch.setattr(render, "sample_latents", spy)
    common = {"model": "demo", "prompts": ("a",), "per_prompt": 1, "seed": 0, "size_px": 64}
    teachers = render.RenderRequest(**common, lora=None, steps=2, guidance=5.0)
    lora = str(student_file(tmp_path / "lora.safetensors"))
    students = render.RenderRequest(**common, lora=lora, steps=None, guidance=None)
    evaluate(teachers, Measures(), tmp_path / "teacher")
    evaluate(students, Measures(), tmp_path / "student")
    assert calls == [
        ("teacher", (999, 499), 5.0, 0.0),
        ("student", (999, 749, 499, 249), 1.0, 1.0),
    ]
    assert read_folder(tmp_path / "student" / "pictures", "x").open(0).size == (64, 64)


def test_processes_share_the_drawing_and_the_pictures_are_the_same(
    tmp_path, tiny_teacher, monkeypatch
) -> None:
    monkeypatch.setattr(render, "rows_at_once", lambda height, width: 2)
    request = render.RenderRequest(
        model="demo", lora=None, prompts=("a", "b", "c"), per_prompt=2, seed=0, steps=1,
        guidance=1.0, size_px=64,
    )  # fmt: skip

    def process(rank: int, ranks: int) -> Any:
        place = {"process_index": rank, "num_processes": ranks, "is_main_process": rank == 0}
        return SimpleNamespace(device=torch.device("cpu"), **place)

    alone = render.render(request, tmp_path / "alone", process(0, 1))
    before = {path.name: path.read_bytes() for path in alone.glob("*.png")}
    for path in alone.glob("*.png"):
        path.unlink()
    render.render(request, tmp_path / "alone", process(1, 2))
    assert sorted(path.name for path in alone.glob("*.png")) == ["000002.png", "000003.png"]
    render.render(request, tmp_path / "alone", process(0, 2))  # of what is missing: half
    assert not (alone / "000004.png").exists()
    render.render(request, tmp_path / "alone", process(0, 1))
    assert {path.name: path.read_bytes() for path in alone.glob("*.png")} == before


def test_a_lora_for_another_kind_of_output_is_refused(tmp_path, tiny_teacher, capsys) -> None:
    recipe = Recipe(timesteps=(999,), prediction="v")
    lora = student_file(tmp_path / "lora.safetensors", recipe)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    argv = ["evaluate", "--model", "demo", "--prompts", str(prompts), "--lora", str(lora)]
    message = failure(capsys, *argv, "--out", str(tmp_path / "out"))
    assert f"--lora {lora} was trained for a model that predicts v" in message
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path, drawn, capsys) -> None:
    _, images = drawn
    few = write_folder(tmp_path / "few", images[:3], ["a", "b", "c"])
    bare = write_folder(tmp_path / "bare", images[:3], None)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n")
    folder = ["evaluate", "--out", str(tmp_path / "out"), "--images", str(few)]
    model = ["evaluate", "--out", str(tmp_path / "out"), "--model", "demo"]
    told = [*model, "--prompts", str(prompts)]
    cases = {
        "at least 65 pictures in each set (the paper took 10,000), but --images has 3": [
            *folder, "--features", "demo", "--reference", str(bare),
        ],
        "--reference needs a network": [*folder, "--reference", str(bare)],
        "Nothing is downloaded here: get it from https://github.com/toshas": [
            *folder, "--features", "inception.pth",
        ],
        "alexnet-owt-7be5be79.pth": [*folder, "--lpips", "alexnet.pth"],
        "Nothing is downloaded unasked": [*folder, "--clip", str(tmp_path)],
        "is for drawing with --model": [*folder, "--seed", "1"],
        "--model needs --prompts": model,
        "'none.txt', which is no file": [*model, "--prompts", "none.txt", "--guidance", "5"],
        "--guidance is the teacher's": told,
        "--size-px is 100": [*told, "--guidance", "5", "--size-px", "100"],
        "--prediction is for a model from outside": [
            *told, "--guidance", "5", "--prediction", "flow",
        ],
        "--per-prompt is 0": [*told, "--guidance", "5", "--per-prompt", "0"],
        "a folder that is not empty": [*told, "--guidance", "5", "--out", str(few)],
        "'Lightning' is none of: DMD2, 4 steps;": [
            "compare", "--model", "demo", "--prompts", str(prompts), "--guidance", "5",
            "--other", "Lightning", str(prompts), "--out", str(tmp_path / "out"),
        ],
        "nothing to compare": [
            "compare", "--model", "demo", "--prompts", str(prompts), "--guidance", "5",
            "--out", str(tmp_path / "out"),
        ],
        "no-such.safetensors does not exist": [
            "evaluate", "--out", "x", "--model", "no-such.safetensors", "--prompts", str(prompts),
            "--guidance", "5",
        ],
    }  # fmt: skip
    for message, argv in cases.items():
        assert message in failure(capsys, *argv)
    assert not (tmp_path / "out").exists()
