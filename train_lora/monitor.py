"""What a run tells while it runs: the progress bar, its records, validation pictures, warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .config import Config
from .distill import Figures
from .distributed import largest
from .health import HealthWatch
from .memory import GIB, memory_in_use
from .trackers import Trackers
from .window import FigureWindow

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .validate import ValidationResult

# Short names for the bar; everything else is in the records.
BAR_FIGURES = {
    "loss/regression": "regression",
    "loss/critic": "critic",
    "loss/matching": "matching",
    "loss/anchor": "anchor",
    "loss/gan_generator": "gan_g",
    "loss/gan_critic": "gan_d",
}


class Monitor:
    """Context of one run, in all processes; only the main one shows and writes anything."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        *,
        first_iteration: int = 0,
        images_per_iteration: int = 1,
        standing: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`first_iteration`: where a resumed run goes on; what was recorded after it, before the
        run was stopped, gives way to the new records. `standing`: figures as they are at a record,
        no means: learning rates, counts."""
        from tqdm import tqdm

        self.config, self.accelerator = config, accelerator
        self.directory = Path(config.output.directory)
        self.images_per_iteration, self.standing = images_per_iteration, standing
        self.window, self.seconds = FigureWindow(), 0.0
        self.trackers: Trackers | None = None
        if accelerator.is_main_process:
            self.trackers = Trackers(config, first_iteration=first_iteration)
        self.health = HealthWatch(self.directory)
        self.bar = tqdm(
            total=config.training.iterations,
            initial=first_iteration,
            desc="distilling",
            unit="it",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
        )
        self.shown: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close()

    def note(self, iteration: int, figures: Figures, seconds: float) -> None:
        """After each iteration, in all processes: its figures and how long it took.

        `iteration`: those done. Every `logging.every` of them, and at the end, the means are
        recorded.
        """
        self.window.add(figures)
        self.seconds += seconds
        settings = self.config
        if iteration % settings.logging.every == 0 or iteration == settings.training.iterations:
            self._record(iteration)
        self.bar.update()

    def _record(self, iteration: int) -> None:
        num_iterations, seconds = self.window.num_iterations, self.seconds
        values = self.window.take(self.accelerator.device)
        self.seconds = 0.0
        name, num_bytes = memory_in_use(self.accelerator.device)
        values[name] = largest(num_bytes, self.accelerator.device) / GIB
        if self.trackers is None:
            return
        if values.get("gradient/matching") and "gradient/gan" in values:
            relative = values["gradient/gan"] / values["gradient/matching"]
            values["gradient/gan_over_matching"] = relative
        values["samples_per_second"] = num_iterations * self.images_per_iteration / seconds
        values |= self.standing()
        self.trackers.log(iteration, values)
        self.health.look(iteration, values, num_iterations)
        for figure, short in BAR_FIGURES.items():
            if figure in values:
                self.shown[short] = f"{values[figure]:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def validated(self, iteration: int, result: ValidationResult) -> None:
        """Record what validation found; its pictures go to `samples/000100.png` and so on, named
        by the iterations done. For the main process."""
        assert self.trackers is not None
        for name, picture in result.pictures.items():
            folder = self.directory / name
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{iteration:06d}.png")
        self.trackers.log(iteration, result.figures)
        self.trackers.log_pictures(iteration, result.pictures)
        self.health.look(iteration, result.figures)
