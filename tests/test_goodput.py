"""The ledger of time, and the expected goodput against a simulation."""

import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.runs.timing import SaveTimer, StageTime
from flm_jax.runtime.goodput import LLAMA3_DEVICE_HOURS, best_interval, between_failures, expected
from flm_jax.runtime.ledger import KINDS, UNKNOWN, Ledger, account, goodput
from flm_jax.store.files import MetricsFile
from tests.commands import ROOT


class Time:
    """A clock that the test moves, and the seconds of compilation that it reports."""

    def __init__(self):
        self.now, self.compiled = 0.0, 0.0

    def __call__(self):
        return self.now

    def take(self):
        taken, self.compiled = self.compiled, 0.0
        return taken


def test_every_second_has_one_kind():
    """For random nested work, with compilation anywhere in it."""
    draw, time = random.Random(0), Time()
    ledger, want = Ledger(time, time.take), dict.fromkeys(KINDS, 0.0)

    def work(kind, depth):
        for _ in range(3):
            for name in (kind, "compile"):
                seconds = draw.random()
                time.now += seconds
                time.compiled += seconds * (name == "compile")
                want[name] += seconds
            if depth:
                inner = draw.choice(KINDS[:1] + KINDS[2:])
                with ledger.spend(inner):
                    work(inner, depth - 1)

    work("other", 4)
    seconds = ledger.seconds()
    assert seconds == pytest.approx(want) and sum(seconds.values()) == pytest.approx(time.now)


def test_compilation_is_counted_once_wherever_it_happens():
    ledger = Ledger()
    with ledger.spend("evaluation"):
        inner = jax.jit(lambda x: jnp.sin(x) @ x)
        jax.jit(lambda x: inner(x) + inner(2 * x))(np.ones((3, 3), np.float32))
    seconds = ledger.seconds()
    assert seconds["compile"] > 0.001 and seconds["evaluation"] >= 0


def row(life, step, **seconds):
    return {"life": life, "step": step, "seconds": dict.fromkeys(KINDS, 0.0) | seconds}


def test_work_that_a_restart_repeats_is_lost():
    rows = [
        row(100, UNKNOWN),
        row(100, 0, start=5.0),
        row(100, 10, start=5.0, steps=10.0),
        row(100, 10, start=5.0, steps=10.0, save=1.0),  # the save at step 10
        row(100, 18, start=5.0, steps=17.0, input=1.0, save=1.0),  # killed some time after it
        row(150, UNKNOWN),
        row(150, 10, start=3.0),
        row(150, 20, start=3.0, steps=10.0, save=1.0),
    ]
    total = account(rows)
    # 124 to 150 is down, and from the save on 8 s are redone.
    assert total["down"] == 26 and total["redone"] == 8
    assert (total["steps"], total["start"], total["save"]) == (20, 8, 2)
    assert sum(total.values()) == 64 == 150 + 14 - 100
    assert goodput(total) == 20 / 64
    # Negative control: without the restart nothing is lost.
    assert not any(account(rows[:5])[kind] for kind in ("down", "redone"))


def test_random_kills_sum_to_wall_time():
    draw = random.Random(1)
    for _ in range(50):
        rows, now, saved, began = [], 1000.0, 0, 1000.0
        for _ in range(draw.randint(1, 5)):
            life, spent, step = now, dict.fromkeys(KINDS, 0.0), saved
            rows.append({"life": life, "step": UNKNOWN, "seconds": dict(spent)})
            for _ in range(draw.randint(0, 6)):
                spent[draw.choice(KINDS)] += draw.random()
                rows.append({"life": life, "step": step, "seconds": dict(spent)})
                saved = step if draw.random() < 0.5 else saved
                step += 1
            end = life + sum(spent.values())
            now = end + draw.random()
        total = account(rows)
        assert sum(total.values()) == pytest.approx(end - began)
        assert all(seconds >= 0 for seconds in total.values())


def test_a_stage_keeps_its_account_over_lives(tmp_path):
    file = MetricsFile(tmp_path / "time.jsonl")
    first = StageTime("a", file, now=lambda: 100.0)
    with first.spend("steps"):
        first.write(3)
    with open(file.path, "a") as torn:
        torn.write('{"kind": "ti')
    second = StageTime("a", file, now=lambda: 200.0)
    second.write(2)
    result = second.result()
    assert [row["step"] for row in file.rows()] == [UNKNOWN, 3, UNKNOWN, 2]
    assert result["seconds"]["redone"] > 0 and result["seconds"]["down"] > 99
    assert 0 <= result["share"] < 1


def test_saves_are_due_by_time():
    time = Time()
    timer, never = SaveTimer(2.0, time), SaveTimer(0.0, time)
    time.now = 119.0
    assert not timer.due()
    time.now = 120.0
    assert timer.due() and not never.due()
    timer.restart()
    assert not timer.due()


# --- On paper ----------------------------------------------------------------------------------


def simulated(interval, save, failure, restart, segments, generator):
    """The goodput of many segments, and its standard error, by drawing failures."""
    spent = np.zeros(segments)
    undone = np.arange(segments)
    restarting = np.zeros(segments, bool)  # whether the segment's next work is a restart
    while undone.size:
        need = np.where(restarting[undone], restart, interval + save)
        draws = generator.exponential(failure, undone.size)
        spent[undone] += np.minimum(draws, need)
        failed = draws < need
        finished = ~failed & ~restarting[undone]
        restarting[undone] = failed
        undone = undone[~finished]
    mean, error = spent.mean(), spent.std() / math.sqrt(segments)
    return interval / mean, interval / mean * error / mean


@pytest.mark.parametrize(
    "case",
    [(1200, 30, 36000, 900), (600, 60, 1000, 300), (5000, 10, 3000, 50), (500, 10, 3000, 4000)],
    ids=str,
)
def test_the_closed_form_is_the_simulation(case):
    """Also where failures are as frequent as saves, and where restarts fail themselves."""
    generator = np.random.default_rng(0)
    mean, error = simulated(*case, segments=40_000, generator=generator)
    assert error < 0.02 * mean
    assert abs(expected(*case) - mean) < 5 * error
    # Negative control: the first-order formula, which ignores failures during the redone work.
    interval, save, failure, restart = case
    crude = interval / (interval + save) * (1 - (interval / 2 + restart) / failure)
    if case == (600, 60, 1000, 300):
        assert abs(crude - mean) > 5 * error


@pytest.mark.parametrize(("save", "failure"), [(30, 36000), (300, 1000), (0.01, 1e6)])
def test_the_best_interval_is_best(save, failure):
    best = best_interval(save, failure)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert expected(factor * best, save, failure, 60) < expected(best, save, failure, 60)
    if save < failure / 1000:
        assert best == pytest.approx(math.sqrt(2 * save * failure), rel=0.02)


def test_the_table_in_the_docs_is_the_formula():
    assert pytest.approx(50_677, abs=1) == LLAMA3_DEVICE_HOURS
    page = (ROOT / "docs" / "clusters.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) h \| (.+?) \|$", page, re.M)
    assert [int(devices.replace(",", "")) for devices, *_ in rows] == [
        512, 1024, 2048, 4096, 6144, 9000,
    ]  # fmt: skip
    for devices, hours, cells in rows:
        failure = between_failures(int(devices.replace(",", "")))
        assert float(hours) == pytest.approx(failure / 3600, abs=0.051)
        best = best_interval(5, failure)
        want = [expected(interval, 5, failure, restart + 120)
                for interval, restart in ((500 * 311, 2700), (1800, 2700), (600, 2700),
                                          (best, 2700), (best, 600))]  # fmt: skip
        shown = [float(x) for x in re.findall(r"([\d.]+)%", cells)]
        assert shown == pytest.approx([100 * share for share in want], abs=0.051)
        assert float(re.search(r"([\d.]+) min", cells)[1]) == pytest.approx(best / 60, abs=0.051)
