"""Progress without a terminal: plain lines at intervals."""

import io

import pytest
import rich.console

from flm_jax.runtime.display import PLAIN_SECONDS, WINDOW_SECONDS, Progress
from flm_jax.runtime.phases import Watch


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def shown(*arguments, unit="steps"):
    """Returns a display that writes to a file, the file, and the display's clock."""
    file, clock = io.StringIO(), Clock()
    console = rich.console.Console(file=file, width=200)
    return Progress(*arguments, unit=unit, clock=clock, console=console), file, clock


def test_training_shows_loss_speed_masks_and_time_left():
    progress, file, clock = shown("large", 10, 30)
    with progress:
        clock.seconds = PLAIN_SECONDS - 1
        progress.update(14, 3.25, 8000, 0.5)
        assert file.getvalue() == ""  # too soon
        clock.seconds = PLAIN_SECONDS
        progress.update(15, 3.25, 8000, 0.5)
        progress.update(16, 3.25, 8000, 0.5)
        progress.note("a line of its own")
        clock.seconds = 2 * PLAIN_SECONDS - 1
        progress.update(30, 2.0, 38000)  # the last step is always shown
    assert file.getvalue().splitlines() == [
        "large  steps 15/30  loss 3.250  1,600 tokens/s  mask 0.50  15 s left",
        "a line of its own",
        "large  steps 30/30  loss 2.000  4,222 tokens/s  0 s left",
    ]


def test_bytes_are_shown_with_size_and_speed():
    progress, file, clock = shown("writing", 1_000_000, 9_000_000, unit="bytes")
    with progress:
        clock.seconds = PLAIN_SECONDS
        progress.add(2_000_000)
        progress.add(6_000_000)
    assert file.getvalue().splitlines() == [
        "writing  3.0 MB of 9.0 MB  400.0 kB/s  15 s left",
        "writing  9.0 MB of 9.0 MB  1.6 MB/s  0 s left",
    ]


def test_counts_are_shown_with_their_total():
    progress, file, clock = shown("judge", unit="samples")
    with progress:
        progress.count(1, 4)
        clock.seconds = PLAIN_SECONDS
        progress.count(2, 4)
        progress.count(4, 4)
    assert file.getvalue().splitlines() == [
        "judge  samples 2/4  5 s left",
        "judge  samples 4/4  0 s left",
    ]


def test_rates_are_over_a_window_and_without_what_is_no_work():
    progress, _, clock = shown("large", 0, 1000)
    clock.seconds = 100  # compiled for 99 s, worked for 1 s
    progress.update(1, 3.0, 50, busy=1.0)
    assert progress.rate() == 50
    for step in range(2, 100):  # then at twice the speed
        progress.update(step, 3.0, 50 * step, busy=1 + (step - 1) / 2)
    assert abs(progress.rate() - 100) < 1e-6
    progress.update(100, 3.0, 5000, busy=1 + 99 / 2 + 3 * WINDOW_SECONDS)
    assert progress.rate() < 2  # the window has moved on


def test_a_long_phase_says_so_and_gives_its_time():
    clock, lines, last = Clock(), [], [0.0]

    def show(line):
        lines.append(line)
        last[0] = clock.seconds

    watch = Watch(clock, show, lambda: last[0])

    def wait(seconds):
        for _ in range(int(2 * seconds)):
            clock.seconds += 0.5
            watch.look()

    wait(20)
    assert lines == []  # nothing is going on
    with watch.phase("growing"):
        wait(4)
        assert lines == []
        with watch.phase("saving"):
            wait(12)
        wait(3)
        show("something else")
        wait(4.5)
    with watch.phase("quick"):
        wait(0.5)
    with pytest.raises(ValueError), watch.phase("failing"):
        clock.seconds += 3
        raise ValueError
    assert lines == [
        "saving ... 5 s",
        "saving ... 10 s",
        "saving  12.0 s",
        "something else",
        "growing  23.5 s",
    ]
