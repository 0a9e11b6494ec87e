"""The live terminal: what is happening, how long it will take, and N(t) as it grows."""

from __future__ import annotations

import itertools
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 48


def sparkline(values: list[int], width: int = WIDTH) -> str:
    """The series as one line of bars, thinned to ``width`` by the maximum of each stretch."""
    if not values:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    top = max(*values, 1)
    return "".join(BARS[round(v / top * (len(BARS) - 1))] for v in values)


class Display:
    """A few lines at the bottom of the terminal; plain messages scroll above them.

    On something that is no terminal it prints the messages only. Use as a context manager.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._phase = ""
        self._share = 0.0
        self._left_s: float | None = None
        self._series: deque[int] = deque(maxlen=4000)
        self._detail = ""
        self._live = Live(
            console=console, refresh_per_second=4, transient=True, get_renderable=self._render
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.quiet:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, message: RenderableType) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(message, highlight=False, soft_wrap=True)

    def phase(self, name: str, share: float = 0.0, left_s: float | None = None) -> None:
        """What is going on now, the share of it that is done, and the seconds left of everything."""
        if name != self._phase:
            self._series.clear()
            self._detail = ""
        self._phase, self._share, self._left_s = name, share, left_s

    def load(self, in_flight: int, sent: int) -> None:
        """One point of N(t) of the run in progress."""
        self._series.append(in_flight)
        self._detail = f"{sent} sent, {in_flight} in system"

    def _render(self) -> RenderableType:
        if not self._phase:
            return Text("")
        line = Table.grid(padding=(0, 2))
        left = "" if self._left_s is None else f"about {max(self._left_s, 0):.0f} s left"
        line.add_row(
            Text(self._phase, style="bold"),
            ProgressBar(total=1.0, completed=min(self._share, 1.0), width=24),
            Text(left, style="dim"),
        )
        if not self._series:
            return line
        return Group(
            line, Text(f"N(t) {sparkline(list(self._series))}  {self._detail}", style="cyan")
        )


class Countdown:
    """Seconds left of a plan whose parts take a known time."""

    def __init__(self, total_s: float) -> None:
        self._end_s = time.monotonic() + total_s

    def left_s(self) -> float:
        return max(self._end_s - time.monotonic(), 0.0)
