"""What the page gets while DMD2's nodes sample: progress and a preview for each step."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import aiohttp
import pytest
from comfy_server import PROMPT_SECONDS, ComfyServer
from model_files import TinyModel
from PIL import Image
from test_sample import Sampling

PREVIEW_IMAGE = 1
"""ComfyUI's binary message: this number and the format's, 4 bytes each, then the picture."""


@dataclass(slots=True)
class Seen:
    progress: list[tuple[int, int]] = field(default_factory=list)
    """(value, max) in the order they came."""
    previews: list[Image.Image] = field(default_factory=list)


async def watched(server: ComfyServer, graph: Sampling) -> Seen:
    """Run `graph` as a page with latent previews does."""
    seen, client = Seen(), "watcher"
    url = f"http://127.0.0.1:{server.port}/ws?clientId={client}"
    request = {"prompt": graph.prompt, "client_id": client}
    request["extra_data"] = {"preview_method": "latent2rgb"}
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        await asyncio.to_thread(server.post, "/prompt", request)
        async with asyncio.timeout(PROMPT_SECONDS):
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind, _ = struct.unpack(">II", message.data[:8])
                    if kind == PREVIEW_IMAGE:
                        seen.previews.append(Image.open(BytesIO(message.data[8:])))
                    continue
                event = message.json()
                assert event["type"] != "execution_error", event
                if event["type"] == "progress":
                    seen.progress.append((event["data"]["value"], event["data"]["max"]))
                if event["type"] == "executing" and event["data"]["node"] is None:
                    return seen
    raise AssertionError("ComfyUI closed the connection")


MADE: dict[str, Callable[[Sampling], list[Any]]] = {
    "DMD2 Sample": lambda graph: graph.dmd2(seed=31),
    "its base model and its own steps": lambda graph: graph.dmd2(seed=32, base_model=graph.base),
    "DMD2 Sampler": lambda graph: graph.by_hand(noise_seed=33),
}


@pytest.mark.parametrize("name", MADE)
def test_each_step_has_its_progress_and_its_preview(
    name: str, server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    graph.add("SaveLatent", samples=MADE[name](graph), filename_prefix="latents/t")
    seen = asyncio.run(watched(server, graph))
    assert seen.progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(seen.previews) == 4
    *_, last = (preview.convert("L").getextrema() for preview in seen.previews)
    assert last[0] < last[1]
