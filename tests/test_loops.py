"""Trip counts of a compiled program's loops, from its text."""

import operator
import random

import pytest

from flm_jax.aot import hlo, loops

_HOLDS = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne,
}  # fmt: skip
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


def program(start, step, bound, direction, *, carried=False, fused=False, flipped=False):
    """A loop whose counter is element 1, and whose body gathers once.

    `carried`: bound and step are elements of the loop's tuple that the body passes on; `fused`: the
    condition compares inside a fusion; `flipped`: the bound is the comparison's left side.
    """
    tuple_type = "(f32[8], s32[], s32[], s32[])"
    amount = "%s" if carried else f"%amount = s32[] constant({abs(step)})"
    body = [
        f"%b.1 (p: {tuple_type}) -> {tuple_type} {{",
        f"  %p = {tuple_type} parameter(0)",
        "  %x = f32[8] get-tuple-element(%p), index=0",
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=1",
        "  %n = s32[] get-tuple-element(%p), index=2",
        "  %s = s32[] get-tuple-element(%p), index=3",
        "" if carried else f"  {amount}",
        f"  %next = s32[] {'add' if step > 0 else 'subtract'}(%i, %{'s' if carried else 'amount'})",
        "  %same = s32[] copy(%next)",
        "  %g = f32[16] all-gather(%x), replica_groups={{0,1}}, dimensions={0}",
        f"  ROOT %t = {tuple_type} tuple(%x, %same, /*index=2*/%n, %s)",
        "}",
    ]
    sides = ("%i", "%n" if carried else "%bound")
    shown = direction
    if flipped:
        sides, shown = sides[::-1], _FLIPPED[direction]
    arguments = ", ".join(sides)
    condition = [
        "%compared (a: s32[], b: s32[]) -> pred[] {",
        "  %a = s32[] parameter(0)",
        "  %b = s32[] parameter(1)",
        f"  ROOT %c = pred[] compare(%a, %b), direction={shown}",
        "}",
        f"%c.1 (p: {tuple_type}) -> pred[] {{",
        f"  %p = {tuple_type} parameter(0)",
        f"  %bound = s32[] constant({bound})",
        "  %i = s32[] get-tuple-element(%p), index=1",
        "  %n = s32[] get-tuple-element(%p), index=2",
        f"  ROOT %f = pred[] fusion({arguments}), kind=kLoop, calls=%compared"
        if fused
        else f"  ROOT %f = pred[] compare({arguments}), direction={shown}",
        "}",
    ]
    entry = [
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8] parameter(0)",
        f"  %start = s32[] constant({start})",
        f"  %bound = s32[] constant({bound})",
        f"  %step = s32[] constant({abs(step)})",
        f"  %t0 = {tuple_type} tuple(%x, %start, %bound, %step)",
        f"  %w = {tuple_type} while(%t0), condition=%c.1, body=%b.1",
        "  ROOT %r = f32[8] get-tuple-element(%w), index=0",
        "}",
    ]
    return "\n".join([*body, *condition, *entry])


def count(text):
    return [move.count for move in hlo.moves(text, 2)]


@pytest.mark.parametrize(
    ("start", "step", "bound", "direction", "expected"),
    [
        (0, 1, 16, "LT", 16),
        (0, 2, 16, "LT", 8),  # the windowed einsum's loop
        (0, 4, 16, "LT", 4),
        (0, 4, 17, "LT", 5),
        (15, -1, 0, "GE", 16),
        (16, -2, 0, "GT", 8),
        (3, 3, 12, "NE", 3),
        (5, 1, 5, "LT", 0),
    ],
)
def test_trips_follow_from_start_step_and_bound(start, step, bound, direction, expected):
    assert count(program(start, step, bound, direction)) == [expected]


def test_trips_of_random_loops_are_those_of_running_them():
    draw = random.Random(0)
    for _ in range(200):
        start, bound = draw.randint(-20, 20), draw.randint(-20, 20)
        step = draw.choice([-4, -3, -2, -1, 1, 2, 3, 4])
        direction = draw.choice(list(_HOLDS))
        value, turns = start, 0
        while _HOLDS[direction](value, bound) and turns <= 100:
            value, turns = value + step, turns + 1
        ways = {way: draw.random() < 0.5 for way in ("carried", "fused", "flipped")}
        found = count(program(start, step, bound, direction, **ways))
        assert found == [None if turns > 100 else turns], (start, step, bound, direction, ways)


@pytest.mark.parametrize(
    "change",
    [
        ("  %start = s32[] constant(0)", "  %start = s32[] custom-call(%x)"),
        ("%amount = s32[] constant(2)", "%amount = s32[] custom-call(%x)"),
        ("  %bound = s32[] constant(16)", "  %bound = s32[] custom-call(%x)"),
        ("direction=LT", "direction=EQ"),
        ("add(%i, %amount)", "multiply(%i, %amount)"),
    ],
)
def test_a_count_that_cannot_be_read_is_unknown(change):
    text = program(0, 2, 16, "LT")
    assert change[0] in text
    changed = text.replace(*change)
    assert count(changed) == [None]
    assert hlo.collectives(hlo.moves(changed, 2)) == {
        "all-gather": {"count": 0, "bytes": 0, "unknown": 1}
    }


def test_the_compilers_own_count_comes_first():
    known = 'body=%b.1, backend_config={"known_trip_count":{"n":"9"}}'
    text = program(0, 2, 16, "LT").replace("body=%b.1", known)
    assert count(text) == [9]


def test_a_tuple_changed_by_the_body_has_no_known_bound():
    """Negative control for carried bounds: the body halves the bound."""
    text = program(0, 1, 16, "LT", carried=True)
    assert count(text) == [16]
    assert count(text.replace("/*index=2*/%n, %s)", "/*index=2*/%next, %s)")) == [None]


def test_computations_by_name():
    assert set(loops.computations(program(0, 1, 2, "LT"))) == {"b.1", "compared", "c.1", "ENTRY"}
