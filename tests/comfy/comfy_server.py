"""A ComfyUI server for the tests: started on a loopback port, talked to over HTTP, ended by pid."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    *("--cpu", "--force-fp32", "--fp32-vae", "--fp32-text-enc"),
    *("--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch"),
    "--disable-all-custom-nodes",
)
START_SECONDS = 180.0
PROMPT_SECONDS = 120.0
END_SECONDS = 20.0

Prompt = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id -> {"class_type", "inputs"}; a link is [node id, output index]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What became of one prompt."""

    outputs: dict[str, dict[str, Any]]
    """Per output node what it shows: {"images": [...]}, {"text": [...]}, ..."""
    error: str | None
    """The exception's message if a node failed."""
    failed_node: str | None
    """Class of the node that failed."""
    log: str
    """What the server wrote meanwhile."""


@dataclass(slots=True)
class ComfyServer:
    comfyui: Path
    base: Path
    """ComfyUI's base directory: models/, custom_nodes/, output/."""
    custom_nodes: tuple[str, ...]
    port: int = 0
    """0: a free one, chosen at the start."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def start(self) -> None:
        if self.port == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        command = [sys.executable, "main.py", *FLAGS, "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--whitelist-custom-nodes", *self.custom_nodes]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start; its log ends with\n{self.log()[-4000:]}")

    def wait(self) -> None:
        """Until the server ends by itself."""
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """End the server by its own process id."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_SECONDS)

    def get_bytes(self, path: str, **query: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.get_bytes(path, **query))

    def post(self, path: str, body: Any) -> Any:
        """The answer's JSON (None for an empty one); RuntimeError with ComfyUI's explanation if
        it refuses."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()}") from None

    def run(self, prompt: Prompt) -> Run:
        """Queue `prompt` and wait for the end, good or bad."""
        before = len(self.log())
        job = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + PROMPT_SECONDS
        while time.monotonic() < deadline:
            # The entry appears when the prompt is done with, successfully or not.
            entry = self.get(f"/history/{job}").get(job)
            if entry is not None:
                return self._result(entry, self.log()[before:])
            time.sleep(0.02)
        raise RuntimeError(f"no result in {PROMPT_SECONDS:g} s; log:\n{self.log()[before:]}")

    @staticmethod
    def _result(entry: dict[str, Any], log: str) -> Run:
        failures = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
        failure = failures[0] if failures else {}
        assert bool(failures) == (entry["status"]["status_str"] == "error")
        return Run(
            outputs=entry["outputs"],
            error=failure.get("exception_message"),
            failed_node=failure.get("node_type"),
            log=log,
        )

    def view(self, file: dict[str, str]) -> bytes:
        """A file that an output node named: {"filename", "subfolder", "type"}."""
        return self.get_bytes("/view", **file)
