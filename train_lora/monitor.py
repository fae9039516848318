"""What a run tells while it runs: the progress bar, TensorBoard records, validation pictures."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .config import Config
from .distill import Figures

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

# Short names for the bar; everything else is in TensorBoard.
BAR_FIGURES = {
    "loss/critic": "critic",
    "loss/matching": "matching",
    "loss/gan_generator": "gan_g",
    "loss/gan_critic": "gan_d",
}


class Monitor:
    """Context of one run; only the main process shows and writes anything."""

    def __init__(
        self, config: Config, accelerator: Accelerator, *, first_iteration: int = 0
    ) -> None:
        """`first_iteration`: where a resumed run goes on; what was recorded from there on, before
        it was stopped, gives way to the new records."""
        from tqdm import tqdm

        self.config, self.accelerator = config, accelerator
        self.directory = Path(config.output.directory)
        self.bar = tqdm(
            total=config.training.iterations,
            initial=first_iteration,
            desc="distilling",
            unit="it",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self.shown: dict[str, str] = {}
        self.writer = None
        if config.logging.tracker == "tensorboard" and accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                str(self.directory / "logs"), purge_step=first_iteration or None
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def record(self, iteration: int, figures: Figures) -> None:
        """Advance the bar; every `logging.every` iterations fetch and record the figures."""
        if self.accelerator.is_main_process and iteration % self.config.logging.every == 0:
            values = {name: float(value) for name, value in figures.items()}
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, iteration)
                if name in BAR_FIGURES:
                    self.shown[BAR_FIGURES[name]] = f"{value:.3f}"
            self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def picture(self, iteration: int, grid: Image) -> None:
        """Save a validation grid as `samples/000100.png`, named by the iterations done."""
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"{iteration + 1:06d}.png")
        if self.writer is not None:
            from numpy import asarray

            self.writer.add_image("samples", asarray(grid), iteration + 1, dataformats="HWC")
