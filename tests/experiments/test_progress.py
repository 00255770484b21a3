"""Progress: few plain lines without a terminal, a bar on one, and no waiting for the device."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.progress import Progress, duration, format_cell, table


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(total, seconds_a_step, *, label="phase", **options):
    stream, clock = io.StringIO(), Clock()
    with Progress(total, label, stream=stream, clock=clock, **options) as progress:
        for step in range(1, total + 1):
            clock.now += seconds_a_step
            progress.update(step, loss=1.0 / step, count=64)
    return stream.getvalue().splitlines()


@given(st.integers(1, 3000), st.floats(1e-4, 1e4))
def test_never_more_than_twenty_plain_lines(total, seconds_a_step):
    lines = run(total, seconds_a_step)
    assert 1 <= len(lines) <= 20
    assert lines[-1].startswith(f"phase: done, {total}/{total} steps, loss")
    assert all("\r" not in line and "\x1b" not in line for line in lines)


def test_a_plain_line_says_loss_speed_and_time_left():
    lines = run(100, 1.0, label="pre-training")
    assert "pre-training: step 10/100, loss 0.1000, 64 events/s, 1 min 30 s left" in lines
    assert lines[-1] == "pre-training: done, 100/100 steps, loss 0.0100, 6,400 events, 64 events/s, 1 min 40 s"
    assert len(run(100, 1e-3)) == 1, "a phase of a tenth of a second is worth one line"
    # one step of an hour: lines come in between the tenths, ever more rarely
    assert 10 <= len(run(10_000, 10.0)) <= 20


def test_speed_forgets_compilation_and_a_resumed_start():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, "resumed", stream=stream, clock=clock, start=500) as progress:
        clock.now += 100.0  # compiling
        progress.update(501, count=10)
        for step in range(502, 1001):
            clock.now += 1.0
            progress.update(step, count=10)
    lines = stream.getvalue().splitlines()
    assert "resumed: step 600/1000, 10 events/s, 6 min 40 s left" in lines


def test_an_exception_is_told_and_not_swallowed():
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(RuntimeError, match="diverged"), Progress(10, "phase", stream=stream, clock=clock) as progress:
        progress.update(3, loss=1.0)
        clock.now += 4.2
        raise RuntimeError("diverged")
    assert stream.getvalue() == "phase: stopped at step 3 of 10 after 4.2 s\n"


def test_an_early_stop_shows_the_step_it_stopped_at():
    stream = io.StringIO()
    with Progress(10, "phase", stream=stream) as progress:
        progress.update(4, loss=jnp.float32(0.5))
    assert stream.getvalue().startswith("phase: done, 4/10 steps, loss 0.5000, ")


class Pending:
    """A loss that the device still computes; reading it early is what must not happen."""

    def __init__(self, value):
        self.value, self.done = value, False

    def is_ready(self):
        return self.done

    def __float__(self):
        assert self.done, "waited for the device"
        return self.value


@pytest.mark.parametrize("interactive", [False, True])
def test_a_loss_that_is_not_ready_is_not_waited_for(interactive):
    stream, clock = io.StringIO(), Clock()
    losses = [Pending(float(i)) for i in range(1, 6)]
    with Progress(5, "phase", stream=stream, clock=clock, interactive=interactive) as progress:
        for step, loss in enumerate(losses, start=1):
            clock.now += 60.0
            if step == 4:
                losses[0].done = True
            progress.update(step, loss=loss)
        for loss in losses:
            loss.done = True
    if not interactive:
        lines = stream.getvalue().splitlines()
        assert "loss" not in lines[0] and "loss 1.0000" in lines[3]
    assert "loss" in stream.getvalue().splitlines()[-1]


@pytest.mark.portable
def test_losses_are_jax_scalars_under_jit():
    stream = io.StringIO()
    with Progress(2, "phase", stream=stream) as progress:
        progress.update(2, loss=jax.jit(lambda x: x * 2)(jnp.float32(0.25)))
    assert "loss 0.5000" in stream.getvalue()


def on_terminal(columns):
    """What a terminal of that many columns is sent in three steps."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    clock = Clock()
    with os.fdopen(writer, "w") as stream, Progress(4, "training", stream=stream, clock=clock) as progress:
        if progress._bar is not None:
            progress._bar.mininterval = 0.0  # draw every time
        for step in (1, 2, 3):
            clock.now += 2.0
            progress.update(step, loss=0.25, count=1000)
    shown = b""
    with os.fdopen(reader, "rb", buffering=0) as sent, contextlib.suppress(OSError):  # EIO: all read, no writer left
        while part := sent.read(65536):  # what was written may arrive in several parts
            shown += part
    return shown.decode()


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left():
    *bars, _, done = [part for part in on_terminal(120).split("\r") if part.strip("\n")]
    assert len(bars) == 4 and all(bar.startswith("training ") and bar.count("|") == 2 for bar in bars)
    assert bars[-1].endswith("| 3/4, loss 0.2500, 500 events/s, 2.0 s left")
    assert done.startswith("training: done, 3/4 steps")


def test_a_terminal_without_a_width_gets_plain_lines():
    shown = on_terminal(0)
    assert "step 1/4" in shown and "|" not in shown


def test_everything_goes_to_standard_error(capsys):
    with Progress(1, "phase", unit="samples") as progress:
        progress.update(1, count=5)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("phase: done, 1/1 steps, 5 samples, ")


def test_impossible_phases_are_refused():
    with pytest.raises(ValueError, match="phase: total_steps is 0"):
        Progress(0, "phase")
    with pytest.raises(ValueError, match=r"phase: start is 11; it must lie in 0\.\.10"):
        Progress(10, "phase", start=11)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_table_aligns_numbers_right_and_text_left():
    rows = [{"system": "DIN", "auc": 0.71234, "n": 12345}, {"system": "DIN + LUM", "auc": None}]
    assert table(rows).splitlines() == [
        "system        auc       n",
        "---------  ------  ------",
        "DIN        0.7123  12,345",
        "DIN + LUM       -       -",
    ]
    assert table(rows, {"auc": "AUC"}).splitlines()[0] == "   AUC"
    assert table(rows, ("n", "system")).splitlines()[2] == "12,345  DIN"
    assert table([], ("a", "b")).splitlines() == ["a  b", "-  -"]
    with pytest.raises(ValueError, match="no row has a column 'aux'; there are system, auc, n"):
        table(rows, ("aux",))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (0.0, "0"),
        (0.5, "0.5000"),
        (-0.00002, "-2e-05"),
        (123.456, "123.5"),
        (54321.9, "54,321.9"),
        (1234567, "1,234,567"),
        ("two\nlines", "two lines"),
    ],
)
def test_cells(value, text):
    assert format_cell(value) == text
