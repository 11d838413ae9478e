"""Hand-made headers, measurements and ledger lines for the tests of the reading half."""

from __future__ import annotations

from typing import Any

from bench.records import Measurement, RunHeader, StepRecord


def row(**changes: Any) -> Measurement:
    """A measurement with harmless values and the given changes; its prefill committed one token."""
    values: dict[str, Any] = {
        "decoder": "ar",
        "task": "t",
        "problem": "1",
        "repeat": 0,
        "prompt_sha": "0" * 16,
        "prompt_tokens": 5,
        "output_tokens": 11,
        "tokens_generated": 11,
        "decode_forwards": 10,
        "prefill_forwards": 1,
        "draft_forwards": 0,
        "drafted": 0,
        "accepted": 0,
        "acceptance_histogram": (0, 10),
        "drafted_at": (),
        "accepted_at": (),
        "prefill_s": 0.5,
        "decode_s": 2.0,
        "forward_s": None,
        "host_s": None,
        "finish": "length",
        "text": "x",
        "token_ids_sha": "a",
        "peak_memory_bytes": None,
    }
    values |= changes
    steps = sum(length * count for length, count in enumerate(values["acceptance_histogram"]))
    return Measurement(**{**values, "tokens_generated": 1 + steps, **changes})


def header(**changes: Any) -> RunHeader:
    """A header of two decoders on two problems of one task."""
    values: dict[str, Any] = {
        "schema": 1,
        "definitions": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "argv": ("run",),
        "profile": {"name": "p", "repeats": 1, "max_new_tokens": 32, "stopping": "task"},
        "environment": {"cpu": "c", "threads": 1, "gpu": None, "versions": {"torch": "2.13"}},
        "commit": "abcdef0123",
        "dirty": False,
        "weights": {"tier": "embedded", "name": "w", "sha256": "s", "parameters": 10},
        "data": {"t": {"kind": "own", "path": "p", "sha256": "d", "shots": 0, "ours": True}},
        "problems": {"t": ("1", "2")},
        "decoders": {
            "ar": {"name": "ar", "params": {}, "lossless": True},
            "tidar:block_len=4,beta=1": {"name": "tidar", "params": {}, "lossless": True},
        },
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
    }
    return RunHeader(**{**values, **changes})


def steps_of(measurement: Measurement, count: int = 2) -> list[StepRecord]:
    """`count` ledger lines for a measurement."""
    return [
        StepRecord(
            decoder=measurement.decoder,
            task=measurement.task,
            problem=measurement.problem,
            repeat=measurement.repeat,
            index=index,
            committed=(1,),
            target_forwards=1,
            draft_forwards=0,
            query_width=1,
            kv_len=5 + index,
            drafted=0,
            accepted=0,
            step_s=None,
            forward_s=None,
        )
        for index in range(count)
    ]
