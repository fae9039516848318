"""What the program tells beside its results: lines on stderr, above the progress bar.

Modules use `logging.getLogger(__name__)`; the command line shows it with `show_messages`.
"""

from __future__ import annotations

import logging
import sys


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = f"dmd2: {record.getMessage()}"
        if "tqdm" in sys.modules:  # only then can there be a bar
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


def show_messages() -> None:
    """From now on, what our modules log from INFO on is shown."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _AboveTheBar) for handler in logger.handlers):
        logger.addHandler(_AboveTheBar())
