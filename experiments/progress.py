"""What a terminal shows while an experiment runs: progress, and plain tables.

On a terminal a bar with loss, events a second and the time left; elsewhere (a file, CI) at most some twenty plain lines
a phase. Showing never makes the training loop wait: a loss still being computed on the device is shown later.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from experiments.results import Cell

WINDOW = 30.0  # seconds over which the speed is taken: long enough to be steady, short enough to forget compilation
MIN_GAP = 2.0  # seconds between two plain lines
FIRST_LINE = 5.0  # seconds to the first plain line of a slow phase; each later wait is twice as long
TENTHS = 10
TIMED_LINES = 8  # with one line for each tenth and the closing one: never more than 19


class Progress:
    """Progress of one phase, as a context manager; everything goes to `stream` (standard error).

    Args: `total_steps`; `label` names the phase; `unit` what `update` counts; `start` the step a resumed phase begins
    from; `stream`, `interactive` (default: whether the stream is a terminal) and `clock` (seconds) for tests.

        with Progress(1000, "pre-training") as progress:
            for step in range(1, 1001):
                ...
                progress.update(step, loss=loss, count=events_in_this_batch)
    """

    def __init__(
        self,
        total_steps: int,
        label: str,
        unit: str = "events",
        *,
        start: int = 0,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"{label}: total_steps is {total_steps}; a phase has at least 1 step")
        if not 0 <= start <= total_steps:
            raise ValueError(f"{label}: start is {start}; it must lie in 0..{total_steps}")
        self._total, self._label, self._unit = total_steps, label, unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._step = start
        self._count = 0.0
        self._loss: Any = None
        self._pending: Any = None
        self._began = self._last_line = clock()
        self._recent: deque[tuple[float, int, float]] = deque([(self._began, start, 0.0)])
        self._tenth = TENTHS * start // total_steps
        self._timed = 0
        terminal = _is_terminal(self._stream) if interactive is None else interactive
        layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"
        options: dict[str, Any] = dict(
            desc=label, file=self._stream, dynamic_ncols=True, bar_format=layout, leave=False
        )
        self._bar = tqdm(total=total_steps, initial=start, **options) if terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._pending is not None:  # the phase is over: now waiting costs nothing
            self._loss, self._pending = self._pending, None
        seconds = self._clock() - self._began
        if kind is not None:
            self._write(f"{self._label}: stopped at step {self._step} of {self._total} after {duration(seconds)}")
            return
        parts = [f"{self._step}/{self._total} steps", *self._loss_text(), *self._total_text(seconds), duration(seconds)]
        self._write(f"{self._label}: done, {', '.join(parts)}")

    def update(self, step: int, *, loss: Any = None, count: float | None = None) -> None:
        """`step`: steps done so far; `loss`: a number or a JAX scalar; `count`: units (events) since the last call."""
        now = self._clock()
        self._step = step
        self._count += 0.0 if count is None else float(count)
        if loss is not None and (self._pending is None or _ready(self._pending)):
            if self._pending is not None:
                self._loss = self._pending
            self._pending = loss
        self._recent.append((now, step, self._count))
        while now - self._recent[1][0] > WINDOW and len(self._recent) > 2:
            self._recent.popleft()
        if self._bar is not None:
            self._draw()
        elif self._due(now):
            self._last_line = now
            left = self._time_left()
            parts = [f"step {step}/{self._total}", *self._loss_text(), *self._speed_text()]
            self._write(f"{self._label}: " + ", ".join([*parts, *([f"{duration(left)} left"] if left else [])]))

    def _draw(self) -> None:
        assert self._bar is not None
        due = self._step - self._bar.n
        if self._bar.last_print_t + self._bar.mininterval <= time.time():  # text only when the bar draws
            left = self._time_left()
            parts = [*self._loss_text(), *self._speed_text(), *([f"{duration(left)} left"] if left else [])]
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(due)

    def _due(self, now: float) -> bool:
        """Whether a plain line is due: at every tenth of the way, and now and then while a tenth takes long."""
        if self._step >= self._total:
            return False  # the closing line says it
        tenth = TENTHS * self._step // self._total
        waited = now - self._last_line
        if tenth > self._tenth and waited >= MIN_GAP:
            self._tenth = tenth
            return True
        if self._timed < TIMED_LINES and waited >= FIRST_LINE * 2**self._timed:
            self._timed += 1
            return True
        return False

    def _loss_text(self) -> list[str]:
        if self._pending is not None and _ready(self._pending):
            self._loss, self._pending = self._pending, None
        return [] if self._loss is None else [f"loss {float(self._loss):.4f}"]

    def _speed_text(self) -> list[str]:
        (t0, _, c0), (t1, _, c1) = self._recent[0], self._recent[-1]
        return [f"{(c1 - c0) / (t1 - t0):,.0f} {self._unit}/s"] if self._count and t1 > t0 else []

    def _total_text(self, seconds: float) -> list[str]:
        if not self._count:
            return []
        speed = [f"{self._count / seconds:,.0f} {self._unit}/s"] if seconds > 0 else []
        return [f"{self._count:,.0f} {self._unit}", *speed]

    def _time_left(self) -> float | None:
        (t0, s0, _), (t1, s1, _) = self._recent[0], self._recent[-1]
        return (self._total - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 else None

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 59.95:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None = None) -> str:
    """`rows` as lines of aligned text: a header, a rule, a line each; numbers to the right.

    `columns`: which, in order; a mapping gives each its heading; by default all, in order of appearance. A value that a
    row lacks, or None, is shown as "-". Raises ValueError for a column that no row has.
    """
    headings = column_headings(rows, columns)
    cells = [[format_cell(row.get(name)) for name in headings] for row in rows]
    right = [all(is_number(row.get(name)) for row in rows if row.get(name) is not None) for name in headings]
    widths = [max(len(heading), *(len(line[i]) for line in cells), 1) for i, heading in enumerate(headings.values())]

    def join(line: Sequence[str]) -> str:
        return "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)).rstrip()

    return "\n".join([join(list(headings.values())), join(["-" * w for w in widths]), *map(join, cells)])


def column_headings(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Column name -> heading, in order (see `table`)."""
    present = dict.fromkeys(name for row in rows for name in row)
    if columns is None:
        return {name: name for name in present}
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if rows and (unknown := [name for name in headings if name not in present]):
        raise ValueError(f"no row has a column {', '.join(map(repr, unknown))}; there are {', '.join(present)}")
    return headings


def is_number(value: Cell) -> bool:
    """Whether `value` is shown as a number (True and False are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_cell(value: Cell) -> str:
    """A value for people: whole numbers with separators, others with four decimals or four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        size = abs(value)
        if 0.001 <= size < 10:
            return f"{value:.4f}"
        return f"{value:,.1f}" if 1000 <= size < 1e7 else f"{value:.4g}"
    return " ".join(str(value).split())


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: a terminal, and one that knows its width (some containers' say 0 columns)."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _ready(value: Any) -> bool:
    """Whether reading `value` would not wait for the device."""
    return value.is_ready() if hasattr(value, "is_ready") else True
