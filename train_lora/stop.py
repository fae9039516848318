"""Ctrl-C and SIGTERM during training: noted at once, obeyed between two iterations."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

IMPATIENCE_SECONDS = 2.0
"""A Ctrl-C sooner after the first is the same one, passed on by a launcher as well."""


class TrainingStopped(Exception):
    """The run was asked to stop and has saved; the message says where and how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `signal_number`; a second Ctrl-C interrupts.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.signal_number = 0
        self._announce = announce
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._since = number, time.monotonic()
            if self._announce:  # print() may not be entered twice, and this can happen inside one
                os.write(2, b"\ndmd2: stopping after this iteration; Ctrl-C again loses it\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
