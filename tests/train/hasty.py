"""`dmd2` in a hurry, for tests of everything around the networks.

The teacher draws in 2 steps in place of 50, its pairs are filed by twos, and compiled blocks run as
they are traced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

from train_lora import cli


def main(argv: Sequence[str] | None = None) -> int:
    from train_lora.models.roles import SharedUNet

    compile_blocks = SharedUNet.compile_blocks
    with (
        mock.patch("train_lora.validate.TEACHER_STEPS", 2),
        mock.patch("train_lora.data.teacher_images.TEACHER_STEPS", 2),
        mock.patch("train_lora.data.teacher_pairs.UNIT_PAIRS", 2),
        mock.patch.object(SharedUNet, "compile_blocks", lambda unet: compile_blocks(unet, "eager")),
    ):
        return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
