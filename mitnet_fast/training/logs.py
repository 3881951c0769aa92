"""Numbers of a run: means over several steps, CSV files that survive a resume, and the progress bar."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..data.files import atomic_write
from .config import ConfigError

NOTABLE_WAIT = 0.05  # share of the time spent waiting for data from which on the progress bar says so
BAR_WIDTH = 12
TIME_WIDTH = 9  # of the time left, hours to hundreds


class Means:
    """Mean of each of several values over the steps since the last :meth:`take`; what is not finite is left out."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take one step's values in."""
        for name, value in values.items():
            finite = math.isfinite(value)
            self.sums[name] = self.sums.get(name, 0.0) + (value if finite else 0.0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def take(self) -> dict[str, float]:
        """The means, in the order in which the values came first; NaN where none was finite. Starts anew."""
        means = {
            name: total / self.counts[name] if self.counts[name] else math.nan for name, total in self.sums.items()
        }
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class CsvLog:
    """A CSV file that rows are appended to; each is on disk before :meth:`write` returns.

    Args:
        path: of the file; rows that are there already stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; the first one gives the header.

        Args:
            row: values by column.

        Raises:
            OSError: the file cannot be written; the error names it.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not self.path.exists():
            writer.writeheader()
        writer.writerow({name: f"{value:.7g}" if isinstance(value, float) else value for name, value in row.items()})
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def rows(self) -> list[dict[str, str]]:
        """All rows; none where there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        """Drop rows, and a last one that was cut off while it was written."""
        rows = self.rows()
        kept = [row for row in rows if None not in row.values() and wanted(row)]
        if not kept:
            self.path.unlink(missing_ok=True)
        elif len(kept) < len(rows):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(kept[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
            with atomic_write(self.path) as stream:
                stream.write(text.getvalue().encode())


def check_tensorboard() -> None:
    """Raise unless curves can be written.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"output.tensorboard: needs the package tensorboard (pip install tensorboard): {error}"
        ) from error


class Curves:
    """Curves for TensorBoard, of the numbers that the CSV files hold.

    Args:
        folder: for the event files.
        enabled: False: nothing is ever written.
        step: that the run goes on from; what was written of later steps is hidden.
    """

    def __init__(self, folder: Path, enabled: bool, step: int) -> None:
        self.writer = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, group: str, row: Mapping[str, Any]) -> None:
        """Add a point to the curve of every column but epoch and step."""
        if self.writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])


class Clock:
    """Images per second and the share of time spent waiting for data, over a run and since the last look."""

    def __init__(self) -> None:
        self.images = self.seconds = self.waited = 0.0
        self._last = (0.0, 0.0, 0.0)

    def add(self, images: int, seconds: float, waited: float) -> None:
        """Take in one step: images, its whole time in seconds, and the part of it before the data came."""
        self.images += images
        self.seconds += seconds
        self.waited += waited

    @property
    def images_per_second(self) -> float:
        """Over the whole run."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the whole time spent waiting for data, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else 0.0

    def lap(self) -> dict[str, float]:
        """Both, since the last lap."""
        now = (self.images, self.seconds, self.waited)
        images, seconds, waited = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        return {"images_per_second": images / max(seconds, 1e-9), "data_wait": waited / max(seconds, 1e-9)}


class Display:
    """Progress bar of a whole run, with losses, images per second and the time left.

    Args:
        console: to write to.
        enabled: False: nothing is ever written.
        steps: of the whole run.
        done: of them, when the bar starts.
        epochs: of the whole run.
    """

    def __init__(self, console: Console, enabled: bool, *, steps: int, done: int, epochs: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not enabled,
            refresh_per_second=2,
        )
        self.epochs = epochs
        self.steps = steps
        self.enabled = enabled
        self.task = self.progress.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, step: int, epoch: int, values: Mapping[str, float], clock: Clock, skipped: int) -> None:
        """Show a step; ``epoch`` counts from 0. Numbers that the terminal has no room for are left out."""
        description = f"epoch {epoch + 1}/{self.epochs}"
        room = self.progress.console.width - len(f"{description}  {self.steps}/{self.steps}  ") - BAR_WIDTH - TIME_WIDTH
        notes = {"total": f"total {values['total']:.4g}", "restored": f"restored {values['restored']:.4g}"}
        notes["speed"] = f"{clock.images_per_second:.3g} images/s"
        if clock.data_wait > NOTABLE_WAIT:
            notes["wait"] = f"[yellow]{clock.data_wait:.0%} waiting for data[/]"
        if skipped:
            notes["skipped"] = f"[yellow]{skipped} skipped[/]"
        fits: set[str] = set()
        for name in ("total", "skipped", "wait", "speed", "restored"):  # what matters most comes first
            length = Text.from_markup(" · ".join(notes[note] for note in (*fits, name) if note in notes)).cell_len
            if name in notes and length <= room:
                fits.add(name)
        numbers = " · ".join(text for name, text in notes.items() if name in fits)
        self.progress.update(self.task, completed=step, description=description, numbers=numbers)

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if self.enabled:
            self.progress.console.print(text, highlight=False, markup=False)
