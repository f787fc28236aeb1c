"""Statistics of pairs against known values, enumeration, integration and simulation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from jepa_dist.errors import UserError
from jepa_dist.sweep.paired import (
    detectable_effect,
    equivalence_p,
    holm,
    mean_interval,
    paired_t_p,
    pairs_to_decide,
    power,
    repeatable_p,
    sign_flip_p,
    t_quantile,
    t_tail,
)
from jepa_dist.sweep.results import Results
from jepa_dist.sweep.verdicts import describe, evidence, undecided_arms

# Next-state prediction at lambda 0.3 against its control, six seeds of a prototype.
PAIRS = (-0.0089, -0.0041, -0.0156, 0.0047, -0.0264, 0.0030)


@pytest.mark.parametrize("freedom", [1, 2, 5, 9, 39, 400])
@pytest.mark.parametrize("t", [-0.3, 0.0, 0.7, 2.0, 12.0])
def test_tails_are_the_integral_of_the_density(freedom: int, t: float) -> None:
    grid = np.linspace(0, abs(t), 100_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_scale) * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
    within = float(np.trapezoid(density, grid)) / math.sqrt(freedom * math.pi)
    assert t_tail(t, freedom) == pytest.approx(0.5 - math.copysign(within, t), abs=1e-9)


def test_quantiles_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 9: 2.262, 39: 2.0227}
    for freedom, quantile in known.items():
        assert t_quantile(0.025, freedom) == pytest.approx(quantile, abs=5e-4)


def test_sign_flips_are_enumerated() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 10):
        values = generator.normal(0.3, 1, count)
        sums = [np.dot(signs, values) for signs in itertools.product((-1, 1), repeat=count)]
        expected = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9)
        assert sign_flip_p(values.tolist()) == pytest.approx(expected)
    assert sign_flip_p([1.0] * 40) == pytest.approx(2.0**-39)
    assert sign_flip_p([1.0] * 41) is None
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_six_pairs_of_a_prototype() -> None:
    p = paired_t_p(PAIRS)
    assert p == pytest.approx(0.162, abs=5e-4)
    low, high = mean_interval(PAIRS) or (0, 0)
    assert (low + high) / 2 == pytest.approx(np.mean(PAIRS))
    assert low < 0 < high
    assert (equivalence_p(PAIRS, 0.005) or 0) > 0.5
    assert (equivalence_p(PAIRS, 0.1) or 1) < 1e-4


def test_fewer_than_two_pairs_have_no_statistics() -> None:
    for pairs in ((), (0.1,)):
        assert paired_t_p(pairs) is None
        assert equivalence_p(pairs, 1.0) is None
        assert pairs_to_decide(pairs, None) is None
        assert repeatable_p(pairs) == 1.0


def test_equal_differences() -> None:
    assert paired_t_p([0.0, 0.0]) == 1.0
    assert paired_t_p([0.5, 0.5]) == 0.0
    assert repeatable_p([0.5] * 6) == pytest.approx(7**-2.5)
    assert equivalence_p([0.0, 0.0], 0.1) == 0.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("pairs", "effect"), [(2, 11.5), (3, 3.25), (4, 2.13), (5, 1.68), (10, 1.0)]
)
def test_detectable_effects(pairs: int, effect: float) -> None:
    assert detectable_effect(pairs) == pytest.approx(effect, rel=0.01)


def test_power_is_what_a_simulation_finds() -> None:
    values = np.random.default_rng(1).normal(0.8, 1, (20_000, 8))
    t = values.mean(1) / values.std(1, ddof=1) * math.sqrt(8)
    found = (np.abs(t) > t_quantile(0.025, 7)).mean()
    assert power(0.8, 8) == pytest.approx(found, abs=0.01)
    assert power(0.0, 8) == pytest.approx(0.05, abs=1e-6)


def test_looking_after_every_pair_keeps_the_error_rate() -> None:
    """The plain t-test, checked as often, does not."""
    generator = np.random.default_rng(2)
    runs = [generator.normal(0, 1, 20).tolist() for _ in range(300)]
    assert np.mean([repeatable_p(values) <= 0.05 for values in runs]) <= 0.05
    naive = [any((paired_t_p(v[:n]) or 0) <= 0.05 for n in range(3, 21)) for v in runs]
    assert np.mean(naive) > 0.12


def test_an_effect_is_found_eventually() -> None:
    values = np.random.default_rng(3).normal(1.0, 1, (100, 30)).tolist()
    assert np.mean([repeatable_p(v) <= 0.05 for v in values]) > 0.9


def results(margins: dict[str, float] | None = None, **arms: tuple[float, ...]) -> Results:
    pairs = len(next(iter(arms.values())))
    everything = {"control": (0.0,) * pairs} | arms
    records = {
        (arm, seed): {"val/bpb": 2.0 + value}
        for arm, values in everything.items()
        for seed, value in enumerate(values)
    }
    return Results([*everything], records, margins=margins or {})


def test_verdicts() -> None:
    found = evidence(
        results(
            {"val/bpb": 0.005},
            better=(-0.1, -0.11, -0.09, -0.1, -0.1, -0.12),
            worse=(0.1, 0.11, 0.09, 0.1, 0.1, 0.12),
            same=(0.0005, -0.0004, 0.0002, -0.0003, 0.0, 0.0001),
            unknown=PAIRS,
        ),
        "val/bpb",
    )
    assert {arm: one.verdict for arm, one in found.items()} == {
        "better": "better than the control",
        "worse": "worse than the control",
        "same": "equivalent to the control within 0.005",
        "unknown": f"undecided: {pairs_to_decide(PAIRS, 0.005)} more pairs would decide",
    }


def test_one_of_many_arms_needs_more_evidence() -> None:
    """One p-value of 0.04 among six arms shows nothing."""
    pairs = (0.3, 0.9, 0.0, 0.5, 0.6, 0.0)
    alone, among = results(a=pairs), results(a=pairs, **{f"b{i}": PAIRS for i in range(5)})
    assert evidence(alone, "val/bpb")["a"].is_different
    assert not evidence(among, "val/bpb")["a"].is_different


def test_undecided_arms() -> None:
    many = tuple(np.random.default_rng(4).normal(0, 0.001, 20))
    clear = tuple(1 + value for value in many)
    assert undecided_arms(results(clear=clear, none=many)) == ["none"]
    assert undecided_arms(results({"val/bpb": 0.01}, clear=clear, none=many)) == []
    assert undecided_arms(results(clear=clear[:1], none=many[:1])) == ["clear", "none"]


def test_the_table_shows_all_that_was_tested() -> None:
    lines = describe(results(next_state=PAIRS))
    (header,) = [line for line in lines if line.startswith("val/bpb")]
    row = lines[lines.index(header) + 1]
    assert header.split("  ")[-1].strip() == "80 % from"
    for value in ("-0.0203 to +0.0045", "0.162", "0.188"):
        assert value in row
    assert lines[-1].startswith("next_state: -0.0079 +- 0.0048 over 6 pairs: undecided: ")


def test_a_plot_shows_every_pair_and_its_interval(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from jepa_dist.sweep.plot import draw_sweep, write_plot

    pairs = (-0.03, -0.02, 0.01, -0.04)
    sweep = results({"val/bpb": 0.005}, helps=pairs, one_pair=(0.5,))
    ax = draw_sweep(sweep).axes[0]
    points = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    (interval,) = (line.get_xdata() for line in ax.lines if line.get_linewidth() == 2.5)
    assert points[0] == pytest.approx(pairs)
    assert points[1] == pytest.approx([0.5])
    assert interval == pytest.approx(mean_interval(pairs))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["helps", "one_pair"]

    write_plot(sweep, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for sweep_, name, problem in (
        (sweep, "plot.gif", r"expected a name that ends in \.png or \.svg"),
        (sweep, "missing/plot.png", "cannot be written: No such file or directory"),
        (Results(["control"]), "plot.png", "no arm has a pair"),
    ):
        with pytest.raises(UserError, match=problem):
            write_plot(sweep_, tmp_path / name)
