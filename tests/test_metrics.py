"""Every number of bench.metrics against one done by hand."""

from __future__ import annotations

import math

import pytest
from made_records import row

from bench import metrics


def test_ratios_are_ratios_of_sums() -> None:
    rows = [
        row(output_tokens=11, decode_forwards=5, decode_s=1.0),
        row(output_tokens=21, decode_forwards=5, decode_s=4.0),
    ]
    assert metrics.decode_tokens(rows) == 30
    assert metrics.tokens_per_nfe(rows) == pytest.approx(30 / 10)
    assert metrics.tokens_per_s(rows) == pytest.approx(30 / 5)
    assert metrics.prefill_s(rows) == pytest.approx(0.5)


def test_tokens_per_nfe_interval_draws_problems() -> None:
    """Two problems: a draw holds one, the other or both, so the bounds are the lone ratios."""
    slow = row(problem="a", output_tokens=5, decode_forwards=4)
    quick = [row(problem="b", repeat=r, output_tokens=7, decode_forwards=2) for r in (0, 1)]
    found = metrics.tokens_per_nfe_interval([slow, *quick])
    assert (found.value, found.low, found.high, found.n) == (16 / 8, 1.0, 3.0, 2)
    alone = metrics.tokens_per_nfe_interval([slow])
    assert (alone.value, alone.low, alone.high) == (1.0, None, None)
    assert metrics.tokens_per_nfe_interval([]) is None


def test_plain_ar_is_exactly_one() -> None:
    rows = [row(), row(output_tokens=4, decode_forwards=3, acceptance_histogram=(0, 3))]
    assert metrics.tokens_per_nfe(rows) == 1.0
    assert metrics.acceptance_length(rows) == 1.0


def test_a_first_token_alone_has_no_decode_phase() -> None:
    only_prefill = [row(output_tokens=1, decode_forwards=0, decode_s=0.0, acceptance_histogram=())]
    assert metrics.tokens_per_nfe(only_prefill) is None
    assert metrics.tokens_per_s(only_prefill) is None
    assert metrics.acceptance_length(only_prefill) is None
    assert metrics.tokens_per_nfe([]) is None
    assert metrics.prefill_s([]) is None


def test_acceptance() -> None:
    rows = [
        row(acceptance_histogram=(0, 2, 1), drafted=9, accepted=1, drafted_at=(3, 3, 3),
            accepted_at=(1, 0, 0)),
        row(acceptance_histogram=(0, 0, 0, 1), drafted=3, accepted=2, drafted_at=(1, 1, 1),
            accepted_at=(1, 1, 0)),
    ]  # fmt: skip
    assert metrics.acceptance_histogram(rows) == (0, 2, 1, 1)
    assert metrics.acceptance_length(rows) == pytest.approx((2 + 2 + 3) / 4)
    assert metrics.acceptance_rate(rows) == pytest.approx(3 / 12)
    assert metrics.acceptance_rate_at(rows) == (2 / 4, 1 / 4, 0.0)
    assert metrics.acceptance_rate([row()]) is None


def test_host_share_needs_every_clock() -> None:
    timed = [row(forward_s=3.0, host_s=1.0), row(forward_s=6.0, host_s=0.0)]
    assert metrics.host_share(timed) == pytest.approx(0.1)
    assert metrics.host_share([*timed, row()]) is None


def test_wilson_by_hand() -> None:
    # 5 of 10: centre 1/2, half width z sqrt(1/40 + z^2/400) / (1 + z^2/10).
    z = 1.959963984540054
    half = z * math.sqrt(1 / 40 + z * z / 400) / (1 + z * z / 10)
    got = metrics.wilson(5, 10)
    assert got is not None
    assert (got.value, got.n) == (0.5, 10)
    assert (got.low, got.high) == pytest.approx((0.5 - half, 0.5 + half))
    none = metrics.wilson(0, 20)
    assert none is not None and none.low == 0.0 and none.high == pytest.approx(0.1611, abs=1e-4)
    assert metrics.wilson(0, 0) is None


def test_speedup_uses_only_shared_pairs() -> None:
    reference = [row(problem=str(n), decode_s=2.0) for n in range(4)]
    ours = [row(problem=str(n), decode_s=1.0, decoder="tidar") for n in range(3)]
    ours.append(row(problem="99", decode_s=1000.0, decoder="tidar"))
    got = metrics.speedup(ours, reference)
    assert got is not None
    assert (got.value, got.low, got.high, got.n) == (2.0, 2.0, 2.0, 3)


def test_speedup_is_of_sums_and_paired() -> None:
    # Tokens differ: 10 tokens in 1 s and 30 in 2 s against 10 in 2 s and 10 in 2 s.
    ours = [row(problem="a", decode_s=1.0), row(problem="b", output_tokens=31, decode_s=2.0)]
    reference = [row(problem="a", decode_s=2.0), row(problem="b", decode_s=2.0)]
    got = metrics.speedup(ours, reference)
    assert got is not None
    assert got.value == pytest.approx((40 / 3) / (20 / 4))
    assert got.low == pytest.approx(2.0) and got.high == pytest.approx(3.0)
    assert got == metrics.speedup(ours, reference)  # the seed fixes the interval


def test_speedup_without_decode_time_is_none() -> None:
    empty = [row(output_tokens=1, decode_s=0.0)]
    assert metrics.speedup(empty, empty) is None
    assert metrics.speedup([], []) is None


def test_speedup_interval_covers() -> None:
    """About 95 % of intervals hold the true ratio (loosely: this checks for gross error)."""
    import numpy as np

    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        pace = rng.lognormal(0, 0.5, 30)  # a slow problem is slow for both: that is what pairs
        ours = [row(problem=str(n), decode_s=p * rng.lognormal(0, 0.2)) for n, p in enumerate(pace)]
        ref = [
            row(problem=str(n), decode_s=2 * p * rng.lognormal(0, 0.2)) for n, p in enumerate(pace)
        ]
        got = metrics.speedup(ours, ref)
        assert got is not None and got.low is not None and got.high is not None
        hits += got.low <= 2.0 <= got.high
    assert hits >= 50


def test_score_difference() -> None:
    got = metrics.score_difference({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "d": 1.0})
    assert got is not None
    assert (got.value, got.n) == (0.5, 2)
    assert got.low == 0.0 and got.high == 1.0
    same = metrics.score_difference({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert same is not None and (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert metrics.score_difference({"a": 1.0}, {"b": 1.0}) is None


def test_equal_outputs_needs_ids_and_text() -> None:
    reference = [row(problem="a"), row(problem="b"), row(problem="c")]
    other = [row(problem="a"), row(problem="b", token_ids_sha="z"), row(problem="x")]
    assert metrics.equal_outputs(other, reference) == (1, 2)


def test_work_per_token_by_hand() -> None:
    """Sums over sums; one row without a count leaves the ratio unknown."""
    rows = [
        row(tokens_processed=200, draft_forwards=12, peak_memory_bytes=5),
        row(tokens_processed=100, draft_forwards=8, peak_memory_bytes=7),
    ]
    assert metrics.decode_tokens(rows) == 20
    assert metrics.tokens_processed_per_token(rows) == 15.0
    assert metrics.draft_forwards_per_token(rows) == 1.0
    assert metrics.peak_memory_bytes(rows) == 7
    old = row()
    assert metrics.tokens_processed_per_token([*rows, old]) is None
    assert metrics.peak_memory_bytes([*rows, old]) is None
    assert metrics.tokens_processed_per_token([]) is None
