"""A model, prompts and seeds to a folder of pictures: resumable, and shared by all processes."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dmd2_core import FAMILIES, Recipe, StepPlan, family_recipe

from .checkpoint_store import write_text
from .data.folders import METADATA
from .data.samples import file_stamp
from .distributed import wait_for_all
from .models.markers import PredictionChoice
from .models.placement import place
from .models.places import check_model_path
from .models.roles import STUDENT, TEACHER, SharedUNet
from .models.text import LATENT_PX
from .output import check_output_directory, writing
from .pictures import to_picture
from .sampling import TEACHER_STEPS, decode_latents, rows_at_once, sample_latents

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .models.components import Components

log = logging.getLogger(__name__)

SETTINGS_FILE, PICTURES = "settings.json", "pictures"
DEMO = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderRequest:
    """What to draw, and by whom: the teacher, or the student where there is a LoRA."""

    model: str
    """A file, a diffusers folder, a hub id or "demo"."""
    prediction: PredictionChoice = "auto"
    """What the model predicts, where its file does not say it."""
    lora: str | None
    prompts: tuple[str, ...]
    per_prompt: int
    seed: int
    steps: int | None
    """None: 50 for the teacher, what the LoRA's recipe says for the student."""
    family: str | None = None
    """One of dmd2_core.FAMILIES, for a LoRA whose file does not say how it is sampled."""
    guidance: float | None
    """Of the teacher; None for the student, which has it built in."""
    size_px: int | None
    """Side of the square pictures; None: what the model was made for."""

    def __post_init__(self) -> None:
        for name in ("per_prompt", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; set it to at least 1.")
        if self.family is not None and (self.lora is None or self.steps is not None):
            raise ValueError("--family is for a --lora, and says its steps; leave --steps out.")
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"--family {self.family!r} is none of: {'; '.join(FAMILIES)}.")
        if self.guidance is not None and self.guidance < 1:
            raise ValueError(f"--guidance is {self.guidance}; set it to at least 1.")
        if self.size_px is not None and (self.size_px < LATENT_PX or self.size_px % LATENT_PX):
            raise ValueError(
                f"--size-px is {self.size_px}; set it to a positive multiple of {LATENT_PX}."
            )
        if (self.lora is None) != (self.guidance is not None):
            raise ValueError(
                "--guidance is the teacher's, and needed for it: give it without --lora (SDXL: 6 "
                "to 8), leave it out with one, whose guidance is built in."
            )
        if self.model == DEMO and self.prediction != "auto":
            raise ValueError("--prediction is for a model from outside; leave it out with demo.")
        if self.model != DEMO:
            check_model_path(self.model)
        if self.lora is not None and not Path(self.lora).is_file():
            raise ValueError(f"--lora is {self.lora!r}, which is no file; name a LoRA.")

    @property
    def captions(self) -> list[str]:
        """One for each picture: all of the first prompt, then of the second."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

    def settings(self) -> dict[str, object]:
        """What decides how the pictures look; equal settings may share a folder."""
        found: dict[str, object] = asdict(self)
        text = "\n".join(self.prompts).encode()
        found["prompts"] = f"{len(self.prompts)}, sha256 {hashlib.sha256(text).hexdigest()}"
        found["files"] = file_stamp(*(Path(p) for p in (self.model, self.lora) if p is not None))
        return found


def picture_name(number: int) -> str:
    return f"{number:06d}.png"


def render(request: RenderRequest, out: Path, accelerator: Accelerator) -> Path:
    """The folder of pictures below `out`, with metadata.jsonl; draws those that it lacks.

    Picture i has the noise of (seed, i): each process takes its share of the batches, and those
    that an earlier, interrupted call with the same settings has drawn stay. All processes call
    this alike.
    """
    check_rendering(request, out)
    folder = out / PICTURES
    numbers = range(len(request.captions))
    missing = {i for i in numbers if not (folder / picture_name(i)).is_file()}
    wait_for_all(accelerator.device)  # all have the same list: nobody draws before
    if missing:
        components = _load(request, accelerator.device)
        unet, recipe = _network(request, components)
        place(components, accelerator.device)
        if accelerator.is_main_process and not (out / SETTINGS_FILE).exists():
            _begin(request, out)  # not before: a LoRA that does not fit shall leave no trace
        wait_for_all(accelerator.device)
        _draw(request, missing, components, unet, recipe, folder, accelerator)
    wait_for_all(accelerator.device)
    return folder


def _begin(request: RenderRequest, out: Path) -> None:
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    rows = (
        json.dumps({"file_name": picture_name(i), "text": text}, ensure_ascii=False) + "\n"
        for i, text in enumerate(request.captions)
    )
    write_text(out / PICTURES / METADATA, "".join(rows))
    settings = json.dumps(request.settings(), indent=2) + "\n"
    write_text(out / SETTINGS_FILE, settings)  # last: it says that the rest is there


def check_rendering(request: RenderRequest, out: Path) -> None:
    """ValueError unless `out` is empty or holds pictures of these settings."""
    file = out / SETTINGS_FILE
    if not file.is_file():
        if not _only_begun(out):
            check_output_directory(out, "--out")
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    for name, value in request.settings().items():
        if there.get(name) != value:
            raise ValueError(
                f"--out {str(out)!r} holds pictures of other settings ({name}: "
                f"{there.get(name)!r}, now {value!r}); name another folder, or "
                "give the same settings to go on."
            )


def _only_begun(out: Path) -> bool:
    """Whether an interrupted call has left nothing but an incomplete start."""
    return (
        out.is_dir()
        and {path.name for path in out.iterdir()} == {PICTURES}
        and not any((out / PICTURES).glob("*.png"))
    )


def _draw(
    request: RenderRequest,
    missing: set[int],
    components: Components,
    unet: SharedUNet,
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    from tqdm import tqdm

    from .data.encode import encode_captions

    role = TEACHER if request.lora is None else STUDENT
    size_px = request.size_px or components.side_px
    captions, rows = request.captions, rows_at_once(size_px, size_px)
    # The same pieces whoever draws them and whatever is there: last bits depend on the batch.
    runs = [range(i, min(i + rows, len(captions))) for i in range(0, len(captions), rows)]
    todo = [run for run in runs if not missing.isdisjoint(run)]
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    for run in tqdm(mine, desc="drawing", disable=not accelerator.is_main_process):
        condition = encode_captions(components, [captions[i] for i in run], size_px)
        latents = sample_latents(
            unet, role, components, condition, recipe.plan(), seed=request.seed, first_index=run[0],
            guidance=request.guidance or 1.0, strength=recipe.strength,
        )  # fmt: skip
        for number, image in zip(run, decode_latents(components, latents), strict=True):
            _write_picture(folder / picture_name(number), image)


def _load(request: RenderRequest, device: torch.device) -> Components:
    if request.model == DEMO:
        from .demo.teacher import load_teacher

        return load_teacher()
    from .models.loading import load_components

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return load_components(request.model, dtype=dtype, prediction=request.prediction)


def _network(request: RenderRequest, components: Components) -> tuple[SharedUNet, Recipe]:
    """The model in its roles, and how the one that draws is sampled.

    Teacher: DDIM. Student: as `family` says, else as its file does, with other steps if wanted. An
    EDM student is a model of its own.
    """
    if components.kind == "edm":
        return SharedUNet(components.unet, {}, seed=0), _recipe_of_edm(request, components)
    if request.lora is None:
        plan = StepPlan.evenly(request.steps or TEACHER_STEPS)
        return SharedUNet(components.unet, {}, seed=0), Recipe(timesteps=plan.timesteps, strength=0)
    from .export import shared_unet_with_lora
    from .model_setup import check_same_prediction

    unet, recipe = shared_unet_with_lora(components.unet, request.lora)
    if recipe is not None:
        check_same_prediction(request.lora, recipe, components, "--lora")
    if request.family is not None:
        return unet, family_recipe(request.family)
    if request.steps is not None:
        timesteps = StepPlan.evenly(request.steps).timesteps
        if recipe is not None and not recipe.knows(timesteps):
            log.warning("%s", _not_trained(request, recipe))
        return unet, Recipe(timesteps=timesteps)
    if recipe is None:
        raise ValueError(
            f"--lora {request.lora!r} does not say how it is sampled; give --family (for one of "
            "another method) or --steps."
        )
    return unet, recipe


def _recipe_of_edm(request: RenderRequest, components: Components) -> Recipe:
    """Student: as its file says, with other steps if wanted. Teacher: DDIM."""
    if request.lora is not None or request.guidance != 1:
        raise ValueError(
            f"{request.model} is an EDM network, which takes no LoRA and no guidance; leave --lora "
            "out, and give --guidance 1."
        )
    if components.recipe is not None:
        if request.steps is None:
            return components.recipe
        return Recipe(timesteps=StepPlan.evenly(request.steps).timesteps)
    return Recipe(timesteps=StepPlan.evenly(request.steps or TEACHER_STEPS).timesteps, strength=0)


def _not_trained(request: RenderRequest, recipe: Recipe) -> str:
    trained = f"at {', '.join(map(str, recipe.timesteps))}"
    if recipe.trained_steps is not None:
        trained = "for {} to {} steps".format(*recipe.trained_steps)
    return f"--lora {request.lora!r} was trained {trained}, and draws in {request.steps} steps"


def _write_picture(path: Path, image: torch.Tensor) -> None:
    """Whole or not at all; a file that begins with a dot is no picture."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        to_picture(image).save(partial, "PNG")
        partial.replace(path)
