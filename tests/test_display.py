"""Progress without a terminal: plain lines at intervals."""

import io

import rich.console

from flm_jax.runtime.display import PLAIN_SECONDS, Progress


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
        "large  steps 15/30  loss 3.250  800 tokens/s  mask 0.50  30 s left",
        "a line of its own",
        "large  steps 30/30  loss 2.000  2,000 tokens/s  0 s left",
    ]


def test_bytes_are_shown_with_size_and_speed():
    progress, file, clock = shown("writing", 1_000_000, 9_000_000, unit="bytes")
    with progress:
        clock.seconds = PLAIN_SECONDS
        progress.add(2_000_000)
        progress.add(6_000_000)
    assert file.getvalue().splitlines() == [
        "writing  3.0 MB of 9.0 MB  200.0 kB/s  30 s left",
        "writing  9.0 MB of 9.0 MB  800.0 kB/s  0 s left",
    ]


def test_counts_are_shown_with_their_total():
    progress, file, clock = shown("judge", unit="samples")
    with progress:
        progress.count(1, 4)
        clock.seconds = PLAIN_SECONDS
        progress.count(2, 4)
        progress.count(4, 4)
    assert file.getvalue().splitlines() == [
        "judge  samples 2/4  10 s left",
        "judge  samples 4/4  0 s left",
    ]
