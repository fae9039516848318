"""The workflows that the pack ships, each a function of the nodes' definitions.

`python tests/comfy/make_workflows.py` writes them into workflows/; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphs import CHECKPOINT, LORA
from workflow_builder import Link, Node, Workflow

ONE_STEP_LORA = "dmd2_sdxl_1step.safetensors"
CONTROLNET = "controlnet-canny-sdxl-1.0.safetensors"
IMAGE = "example.png"
SIZE_PX = 1024
PROMPT = "a lighthouse on a cliff at dawn, photograph"
PROMPTS = f"{PROMPT}\na portrait of an old fisherman, film photograph"
NEGATIVE = "blurry, text, watermark"
NO_NEGATIVE = "Negative prompt (no effect at cfg 1)"
FAMILY = "DMD2, 4 steps"

# Bold, not code: on the notes' colour the newer of the page's two node designs hides code.
FILES = {
    "checkpoint": f"- **{CHECKPOINT}** (or any SDXL checkpoint) into **models/checkpoints**",
    "lora": f"- **{LORA}** into **models/loras**: the published LoRA "
    "(huggingface.co/tianweiy/DMD2, not for commercial use). Or a LoRA of your own "
    '(*dmd2 train*): then set **family** to "from the file".',
    "one_step": f"- **{ONE_STEP_LORA}** into **models/loras**: a one-step LoRA of your own "
    "(*dmd2 train --preset sdxl-1step*)",
    "controlnet": f"- **{CONTROLNET}** into **models/controlnet**: "
    "huggingface.co/diffusers/controlnet-canny-sdxl-1.0, renamed. Any SDXL ControlNet works.",
}


def _note(flow: Workflow, title: str, text: str, files: list[str], height_px: int) -> None:
    listed = "\n".join(FILES[name] for name in files)
    flow.note(f"## {title}\n\n{text.strip()}\n\n**Files**\n\n{listed}", height_px)


def models(flow: Workflow, lora: str = LORA, family: str = FAMILY) -> tuple[Node, Node]:
    """Checkpoint and LoRA, below the note."""
    checkpoint = flow.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    loader = flow.add(
        "DMD2_LoadLoRA", model=checkpoint["MODEL"], lora_name=lora, family=family, strength=1.0
    )
    return checkpoint, loader


def prompt(flow: Workflow, clip: Link, text: str = PROMPT, title: str = "Prompt") -> Node:
    return flow.add("CLIPTextEncode", title, clip=clip, text=text)


def negative_prompt(flow: Workflow, clip: Link) -> Node:
    return prompt(flow, clip, NEGATIVE, "Negative prompt (works at cfg 1)")


def empty(flow: Workflow) -> Node:
    size = {"width": SIZE_PX, "height": SIZE_PX}
    return flow.add("EmptyLatentImage", **size, batch_size=1)


def _picture(flow: Workflow, latent: Link, vae: Link) -> None:
    decoded = flow.add("VAEDecode", samples=latent, vae=vae)
    flow.add("SaveImage", images=decoded["IMAGE"], filename_prefix="dmd2")


def text_to_image(flow: Workflow) -> None:
    flow.column(400)
    text = """
SDXL in 4 steps. **DMD2 Sample** takes steps, timesteps and noise from the LoRA's recipe: nothing
else is to be set. Its chart shows the timesteps.

The negative prompt acts through attention guidance (**nag_scale**), since the model runs at cfg
1.
"""
    _note(flow, "Text to image, 4 steps", text, ["checkpoint", "lora"], 300)
    checkpoint, loader = models(flow)
    flow.column(380)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = negative_prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    latent = empty(flow)["LATENT"]
    flow.column(340)
    sampled = flow.add(
        "DMD2_Sample",
        model=loader["model"],
        positive=positive,
        negative=negative,
        latent_image=latent,
    )
    flow.column(420)
    _picture(flow, sampled["latent"], checkpoint["VAE"])


def four_steps(flow: Workflow) -> None:
    flow.column(400)
    text = """
The same as *DMD2 Sample*, from its parts: **DMD2 Scheduler** gives the trained timesteps, **DMD2
Sampler** the noise between them, ComfyUI's SamplerCustom runs them. Keep its **cfg at 1**:
guidance is baked into the LoRA, so the negative prompt here does nothing.
"""
    _note(flow, "4 steps with SamplerCustom", text, ["checkpoint", "lora"], 290)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = prompt(flow, checkpoint["CLIP"], "", NO_NEGATIVE)["CONDITIONING"]
    latent = empty(flow)["LATENT"]
    flow.column(320)
    sigmas = flow.add("DMD2_Scheduler", model=loader["model"], recipe=loader["recipe"])
    sampler = flow.add("DMD2_Sampler", recipe=loader["recipe"])
    flow.add("PreviewAny", "What the LoRA says", source=loader["report"])
    flow.column(340)
    sampled = _sample_custom(flow, loader["model"], positive, negative, sampler, sigmas, latent)
    flow.column(420)
    _picture(flow, sampled, checkpoint["VAE"])


def _sample_custom(
    flow: Workflow,
    model: Link,
    positive: Link,
    negative: Link,
    sampler: Any,
    sigmas: Any,
    latent: Link,
) -> Link:
    return flow.add(
        "SamplerCustom",
        model=model,
        positive=positive,
        negative=negative,
        sampler=sampler["sampler"],
        sigmas=sigmas["sigmas"],
        latent_image=latent,
        cfg=1.0,
        noise_seed=0,
    )["output"]


def one_step(flow: Workflow) -> None:
    flow.column(400)
    text = """
One network evaluation. A one-step model starts from pure noise but is told an earlier timestep
(SDXL: 399). **DMD2 Conditioning Timestep** arranges that; scheduler and SamplerCustom both get
its model.
"""
    _note(flow, "Text to image, 1 step", text, ["checkpoint", "one_step"], 260)
    checkpoint, loader = models(flow, ONE_STEP_LORA, "from the file")
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = prompt(flow, checkpoint["CLIP"], "", NO_NEGATIVE)["CONDITIONING"]
    latent = empty(flow)["LATENT"]
    flow.column(320)
    patched = flow.add("DMD2_ConditioningTimestep", model=loader["model"], recipe=loader["recipe"])
    sigmas = flow.add("DMD2_Scheduler", model=patched["model"], recipe=loader["recipe"])
    sampler = flow.add("DMD2_Sampler", recipe=loader["recipe"])
    flow.column(340)
    sampled = _sample_custom(flow, patched["model"], positive, negative, sampler, sigmas, latent)
    flow.column(420)
    _picture(flow, sampled, checkpoint["VAE"])


def image_to_image(flow: Workflow) -> None:
    flow.column(400)
    text = """
**denoise** snaps to a trained timestep: 0.75 starts at 749, 0.5 at 499, 0.25 at 249. The chart
shows which. Lower keeps more of your picture. (KSampler's denoise would leave the trained
timesteps.)
"""
    _note(flow, "Image to image", text, ["checkpoint", "lora"], 290)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = negative_prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    image = flow.add("LoadImage", "Your picture", image=IMAGE)
    flow.column(340)
    latent = flow.add("VAEEncode", pixels=image["IMAGE"], vae=checkpoint["VAE"])["LATENT"]
    sampled = flow.add(
        "DMD2_Sample",
        model=loader["model"],
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=0.75,
    )
    flow.column(420)
    _picture(flow, sampled["latent"], checkpoint["VAE"])


def inpainting(flow: Workflow) -> None:
    flow.column(400)
    text = """
Paint a mask on your picture: right-click on it, *Open in MaskEditor*. What you paint is made
anew, the rest stays. At denoise 0.75 what was there shines through; at 1 it does not.
"""
    _note(flow, "Inpainting", text, ["checkpoint", "lora"], 290)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = negative_prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    image = flow.add("LoadImage", "Your picture, with a mask", image=IMAGE)
    flow.column(340)
    encoded = flow.add("VAEEncode", pixels=image["IMAGE"], vae=checkpoint["VAE"])["LATENT"]
    masked = flow.add("SetLatentNoiseMask", samples=encoded, mask=image["MASK"])["LATENT"]
    sampled = flow.add(
        "DMD2_Sample",
        model=loader["model"],
        positive=positive,
        negative=negative,
        latent_image=masked,
    )
    flow.column(420)
    decoded = flow.add("VAEDecode", samples=sampled["latent"], vae=checkpoint["VAE"])
    whole = flow.add(
        "ImageCompositeMasked",
        "Keep the rest, pixel by pixel",
        destination=image["IMAGE"],
        source=decoded["IMAGE"],
        mask=image["MASK"],
    )
    flow.add("SaveImage", images=whole["IMAGE"], filename_prefix="dmd2")


def hires_fix(flow: Workflow) -> None:
    flow.column(400)
    text = """
First 4 steps at 1024 px; then the picture is enlarged 1.5 times and gets the last 2 steps again
(denoise 0.5 starts at timestep 499, the second of the trained steps from the end).
"""
    _note(flow, "Hires fix in two passes", text, ["checkpoint", "lora"], 290)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = negative_prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    latent = empty(flow)["LATENT"]
    flow.column(340)
    prompts = {"model": loader["model"], "positive": positive, "negative": negative}
    first = flow.add("DMD2_Sample", "First pass", latent_image=latent, **prompts)
    flow.column(300)
    small = flow.add("VAEDecode", samples=first["latent"], vae=checkpoint["VAE"])["IMAGE"]
    large = flow.add("ImageScaleBy", image=small, upscale_method="lanczos", scale_by=1.5)["IMAGE"]
    encoded = flow.add("VAEEncode", pixels=large, vae=checkpoint["VAE"])["LATENT"]
    flow.column(340)
    second = flow.add("DMD2_Sample", "Second pass", latent_image=encoded, denoise=0.5, **prompts)
    flow.column(420)
    _picture(flow, second["latent"], checkpoint["VAE"])


def controlnet(flow: Workflow) -> None:
    flow.column(400)
    text = """
The edges of your picture guide the image. With few steps a ControlNet acts strongly: start with
**strength** 0.5 to 0.8.
"""
    _note(flow, "ControlNet", text, ["checkpoint", "lora", "controlnet"], 310)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = negative_prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    image = flow.add("LoadImage", "Your picture", image=IMAGE)
    flow.column(320)
    edges = flow.add("Canny", image=image["IMAGE"], low_threshold=0.2, high_threshold=0.5)
    net = flow.add("ControlNetLoader", control_net_name=CONTROLNET)
    guided = flow.add(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=net["CONTROL_NET"],
        image=edges["IMAGE"],
        vae=checkpoint["VAE"],
        strength=0.7,
    )
    latent = empty(flow)["LATENT"]
    flow.column(340)
    sampled = flow.add(
        "DMD2_Sample",
        model=loader["model"],
        positive=guided["positive"],
        negative=guided["negative"],
        latent_image=latent,
    )
    flow.column(420)
    _picture(flow, sampled["latent"], checkpoint["VAE"])


def stock_ksampler(flow: Workflow) -> None:
    flow.column(400)
    text = """
For graphs that keep ComfyUI's KSampler: **DMD2 for KSampler** has it run exactly the trained
timesteps at cfg 1, whatever scheduler, steps and cfg it shows. Take the sampler *lcm* for DMD2
and LCM, *euler* for SDXL-Lightning and Hyper-SD.
"""
    _note(flow, "Stock KSampler", text, ["checkpoint", "lora"], 290)
    checkpoint, loader = models(flow)
    flow.column(360)
    positive = prompt(flow, checkpoint["CLIP"])["CONDITIONING"]
    negative = prompt(flow, checkpoint["CLIP"], "", NO_NEGATIVE)["CONDITIONING"]
    latent = empty(flow)["LATENT"]
    flow.column(340)
    patched = flow.add("DMD2_KSamplerPatch", model=loader["model"], recipe=loader["recipe"])
    sampled = flow.add(
        "KSampler",
        model=patched["model"],
        positive=positive,
        negative=negative,
        latent_image=latent,
        steps=4,
        cfg=1.0,
        sampler_name="lcm",
        scheduler="simple",
    )
    flow.column(420)
    _picture(flow, sampled["LATENT"], checkpoint["VAE"])


def compare(flow: Workflow) -> None:
    flow.column(400)
    text = """
The same prompts and noise through several models, as one labelled grid: here the LoRA at full
strength, at 0.7, and the model without it in many steps. Each model is sampled by the recipe that
it carries.
"""
    _note(flow, "Compare", text, ["checkpoint", "lora"], 290)
    checkpoint = flow.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    flow.column(340)
    options = {"model": checkpoint["MODEL"], "lora_name": LORA, "family": FAMILY}
    full = flow.add("DMD2_LoadLoRA", "Full strength", strength=1.0, **options)
    weak = flow.add("DMD2_LoadLoRA", "Strength 0.7", strength=0.7, **options)
    flow.column(400)
    grid = flow.add(
        "DMD2_Compare",
        clip=checkpoint["CLIP"],
        vae=checkpoint["VAE"],
        model_1=full["model"],
        label_1="LoRA, 4 steps",
        model_2=weak["model"],
        label_2="LoRA at 0.7, 4 steps",
        teacher=checkpoint["MODEL"],
        prompts=PROMPTS,
    )
    flow.column(640)
    flow.add("SaveImage", images=grid["grid"], filename_prefix="dmd2_compare")


WORKFLOWS: dict[str, Callable[[Workflow], None]] = {
    "dmd2_text_to_image": text_to_image,
    "dmd2_4step": four_steps,
    "dmd2_1step": one_step,
    "dmd2_image_to_image": image_to_image,
    "dmd2_inpainting": inpainting,
    "dmd2_hires_fix": hires_fix,
    "dmd2_controlnet": controlnet,
    "dmd2_compare": compare,
    "dmd2_ksampler": stock_ksampler,
}
"""Name of the file in workflows/ -> what builds it."""


def build(name: str, object_info: dict[str, Any]) -> dict[str, Any]:
    flow = Workflow(object_info)
    WORKFLOWS[name](flow)
    return flow.data()
