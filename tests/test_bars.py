"""Bars of graphed steps: passed, failed and open by made-up times; nothing from other steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from bench.metrics import Interval
from bench.slots import bars, curves
from tidar_ref.shapes import shape

GPU = "NVIDIA H100 80GB HBM3"
AR, K8, K16 = "ar:graphs=8", "tidar:block_len=8,graphs=8", "tidar:block_len=16,graphs=8"


def interval(value: float, spread: float = 0.01) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread), n=8)


def point(what: str, seconds: float, ratio: float, **changes: Any) -> curves.Point:
    values: dict[str, Any] = {
        "job": "steps-8b", "weights": "random:qwen3-8b", "dtype": "bfloat16", "what": what,
        "kv_len": 1024, "batch": 1, "status": "ok", "detail": None, "captured": True,
        "latency": interval(seconds), "ratio": interval(ratio), "host_s": seconds * 1.01,
    }  # fmt: skip
    return curves.Point(**{**values, **changes})


def judged(*found: curves.Point) -> dict[str, bars.Bar]:
    config = dataclasses.asdict(shape("qwen3-8b").config)
    record: Any = SimpleNamespace(
        models={"random:qwen3-8b": {"config": config}},
        header=SimpleNamespace(environment={"gpu": GPU}),
    )
    rows = bars.bars(record, found)
    names = ("floor", "K16 8b", "K16 1.5b", "K8 8b", "host ar", "host K16")
    return dict(zip(names, rows, strict=True))


def test_each_bar_is_passed_failed_or_open() -> None:
    # 8.2e9 parameters in bfloat16 less the embedding rows not read, at 3.35 TB/s: about 4.6 ms
    good = judged(point(AR, 0.0055, 1), point(K8, 0.0058, 1.05), point(K16, 0.0065, 1.18))
    assert 0.78 < (good["floor"].value or 0) < 0.88
    for name in ("floor", "K16 8b", "K8 8b"):
        assert good[name].verdict == "passed", name
    assert good["host ar"].verdict.startswith("passed")
    assert good["K16 1.5b"].verdict == "open: not measured"
    bad = judged(point(AR, 0.009, 1, host_s=0.0095), point(K8, 0.01, 1.2), point(K16, 0.01, 1.25))
    assert bad["floor"].verdict == bad["K8 8b"].verdict == "failed"
    assert bad["K16 8b"].verdict == "open: the interval holds the limit"
    assert bad["host ar"].verdict.startswith("failed")
    once = Interval(value=1.05, low=None, high=None, n=1)
    assert judged(dataclasses.replace(point(K8, 0.0058, 1.05), ratio=once))[
        "K8 8b"
    ].verdict.startswith("open")


def test_only_captured_plain_steps_count() -> None:
    good = point(K16, 0.0065, 1.18)
    assert judged(good)["K16 8b"].value == 1.18
    for changes in (
        {"captured": False}, {"kv_len": 4096}, {"batch": 16},
        {"weights": "random:qwen2.5-1.5b-other"}, {"status": "no memory"},
        {"what": "tidar:block_len=16,beta=0,graphs=8"},
    ):  # fmt: skip
        assert judged(dataclasses.replace(good, **changes))["K16 8b"].value is None, changes


def test_a_bar_takes_the_fastest_route_and_names_it() -> None:
    slow, flex = point(K16, 0.0065, 1.18), point(K16, 0.0070, 1.3, attention="flex")
    found = judged(slow, flex, point(K16, 0.0060, 1.1, compiled=True, job="compiled-8b"))
    assert found["K16 8b"].value == 1.1 and found["K16 8b"].what.endswith("(sdpa compiled)")
    assert judged(slow, flex)["K16 8b"].what == judged(slow)["K16 8b"].what
