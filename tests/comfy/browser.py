"""A headless Chromium for the tests, spoken to over its DevTools protocol (no driver is needed).

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--no-first-run", "--remote-debugging-port=0"),
    *("--hide-scrollbars", "--mute-audio"),
)
WAIT_SECONDS = 60.0
END_SECONDS = 10.0


def chromium() -> str:
    """The browser's program; RuntimeError with the remedy if there is none."""
    for name in NAMES:
        found = shutil.which(name)
        if found is not None:
            return found
    raise RuntimeError(
        "no Chromium was found: install it (Debian: apt-get install chromium), or leave these "
        "tests out with PYTEST_ARGS='--ignore=tests/comfy/test_browser.py'"
    )


class Page:
    """One tab. `problems` collects what the page reports: errors in its console, exceptions, and
    requests that failed."""

    def __init__(self, profile: Path, width_px: int, height_px: int) -> None:
        self.problems: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._last_id = 0
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._log = (profile.parent / f"{profile.name}.log").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait(self._connect(profile / "DevToolsActivePort"))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1}
            self.send("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        except BaseException:
            self.close()
            raise

    def _wait(self, job: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(job, WAIT_SECONDS))

    async def _connect(self, port_file: Path) -> None:
        while not port_file.is_file() or not port_file.read_text().strip():
            if self._process.poll() is not None:
                raise RuntimeError(f"Chromium ended at once; see {self._log.name}")
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
            tabs = await response.json()
        [tab] = [tab for tab in tabs if tab["type"] == "page"]
        address = tab["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def send(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        return self._wait(self._send(method, parameters))

    async def _send(self, method: str, parameters: dict[str, Any]) -> Any:
        wanted = await self._command(method, parameters)
        while True:
            message = json.loads(await self._socket.receive_str())
            if message.get("id") == wanted:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            if message.get("method") == "Page.javascriptDialogOpening":
                # "Leave this page?", which would keep it from opening another address.
                await self._command("Page.handleJavaScriptDialog", {"accept": True})
            elif "method" in message:
                self._note(message["method"], message["params"])

    async def _command(self, method: str, parameters: dict[str, Any]) -> int:
        """Send it; the id under which its answer will come."""
        self._last_id += 1
        await self._socket.send_json({"id": self._last_id, "method": method, "params": parameters})
        return self._last_id

    def _note(self, event: str, data: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", "")
            self.problems.append(f"exception: {details['text']} {thrown}")
        elif event == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            words = [str(part.get("value", part.get("description"))) for part in data["args"]]
            frames = data.get("stackTrace", {}).get("callFrames", [])
            places = " < ".join(f"{frame['functionName']} {frame['url']}" for frame in frames[:4])
            self.problems.append(f"console: {' '.join(words)} ({places})")
        elif event == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.problems.append(f"log: {data['entry']['text']} {data['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """An expression's JSON value, awaited if it is a promise; RuntimeError if it throws."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self.send("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", "")
            raise RuntimeError(f"{details['text']} {thrown}")
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = WAIT_SECONDS) -> None:
        """Until a JavaScript expression is true; RuntimeError with it if that takes too long."""
        milliseconds = round(1000 * min(seconds, WAIT_SECONDS - 1))
        script = f"""new Promise((resolve) => {{
            const end = Date.now() + {milliseconds}
            const look = () => {{
                let fulfilled = false
                try {{ fulfilled = Boolean({condition}) }} catch {{ /* not there yet */ }}
                if (fulfilled || Date.now() > end) resolve(fulfilled)
                else setTimeout(look, 50)
            }}
            look()
        }})"""
        if not self.run(script):
            raise RuntimeError(f"the page never came to {condition}; it reported {self.problems}")

    def screenshot(self, file: Path, clip: dict[str, float] | None = None) -> None:
        """A PNG of what is seen, or of the part `clip` (x, y, width, height in px)."""
        part = {} if clip is None else {"clip": clip | {"scale": 1}}
        data = self.send("Page.captureScreenshot", format="png", **part)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser by its own process id."""
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS)
        self._log.close()
        self._loop.close()
