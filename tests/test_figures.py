"""Every figure is saved as an image, as SVG and with its data as CSV."""

import csv

import numpy as np
import pytest

from flm_jax.runtime import figures
from flm_jax.runtime.display import short
from flm_jax.runtime.figures import plt


def drawn():
    """A figure with every kind of mark, and guides."""
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([1, 2], [3.0, 4.0], label="loss")
    left.axvline(1.5)
    left.axhline(3.5)
    left.errorbar([1, 2], [5.0, 6.0], [0.5, 0.25], capsize=3, label="mean")
    left.set(title="a panel", xlabel="steps", ylabel="nats")
    right.bar([0, 1], [7.0, 8.0], label="bars")
    right.imshow([[1.0, 2.0]])
    figures.whole(left.xaxis)
    figures.counted(right.yaxis)
    return figure


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_figure_has_its_data_and_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        figures.save(drawn(), tmp_path / name / "plot.png")
        assert {p.suffix for p in (tmp_path / name).iterdir()} == {".png", ".svg", ".csv"}
    for suffix in (".png", ".svg", ".csv"):
        one, two = ((tmp_path / n / f"plot{suffix}").read_bytes() for n in ("one", "two"))
        assert one == two
    rows = rows_of(tmp_path / "one/plot.csv")
    assert {(r["panel"], r["x_label"], r["y_label"]) for r in rows if r["series"] == "loss"} == {
        ("0 a panel", "steps", "nats")
    }
    points = [(r["series"], float(r["x"]), float(r["y"]), r["low"], r["high"]) for r in rows]
    assert points == [
        ("loss", 1, 3, "", ""), ("loss", 2, 4, "", ""),
        ("mean", 1, 5, "4.5", "5.5"), ("mean", 2, 6, "5.75", "6.25"),
        ("bars", 0, 7, "", ""), ("bars", 1, 8, "", ""),
        ("image 0", 0, 0, "", ""), ("image 0", 1, 0, "", ""),
    ]  # fmt: skip
    assert [r["value"] for r in rows][-2:] == ["1.0", "2.0"]


def test_other_data_give_other_files(tmp_path):
    """Negative control."""
    figure = drawn()
    figure.axes[0].lines[0].set_ydata(np.array([3.0, 4.5]))
    figures.save(drawn(), tmp_path / "one/plot.png")
    figures.save(figure, tmp_path / "two/plot.png")
    for suffix in (".png", ".svg", ".csv"):
        one, two = ((tmp_path / n / f"plot{suffix}").read_bytes() for n in ("one", "two"))
        assert one != two


def test_ticks_of_steps_are_whole_and_counts_are_short():
    figure, panel = plt.subplots()
    panel.plot([0, 1], [0, 77_700])
    figures.whole(panel.xaxis)
    figures.counted(panel.yaxis)
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in panel.get_xticks())
    assert panel.yaxis.get_major_formatter()(40_000, 0) == "40k"
    plt.close(figure)


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (999_600, "1M"), (77_712, "77.7k"), (0, "0"), (-2e9, "-2B")]
)
def test_counts_are_written_as_people_say_them(number, text):
    assert short(number) == text
