"""Attention, MLP, head and rest of one forward, timed by hooks in a pass of their own.

The marks lie where the network's own modules begin and end: a layer begins, its MLP norm begins, it
ends. Compiled CPU layers are called by halves then, and mark the same places. Attention is all
before the MLP norm (its norm, projections, rotary, cache write, residual); rest is embedding, mask,
rotary tables and final norm. Imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tidar_ref.model import Transformer

PARTS = ("attention", "mlp", "head", "rest")


def split_run(
    model: Transformer, backbone: Callable[[], Any], head: Callable[[], Any]
) -> dict[str, float]:
    """Seconds by part of one run; they sum to "total". ValueError if a layer was not seen."""
    marks: list[Any] = []
    with _marked(model, marks):
        _mark(model.device, marks)
        backbone()
        _mark(model.device, marks)
        head()
        _mark(model.device, marks)
    if len(marks) != 3 * len(model.layers) + 3:
        raise ValueError(f"saw {len(marks)} marks of {len(model.layers)} layers: no split")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

    def between(a: int, b: int) -> float:
        if model.device.type == "cuda":
            return marks[a].elapsed_time(marks[b]) / 1000
        return marks[b] - marks[a]

    layers = range(1, len(marks) - 2, 3)
    parts = {
        "attention": sum(between(i, i + 1) for i in layers),
        "mlp": sum(between(i + 1, i + 2) for i in layers),
        "head": between(len(marks) - 2, len(marks) - 1),
        "total": between(0, len(marks) - 1),
    }
    parts["rest"] = parts["total"] - parts["attention"] - parts["mlp"] - parts["head"]
    return parts


def median_split(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run of median total, the lower of two: medians part by part would not sum to a run."""
    return sorted(runs, key=lambda run: run["total"])[(len(runs) - 1) // 2]


def _mark(device: torch.device, marks: list[Any]) -> None:
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append(event)
    else:
        marks.append(time.perf_counter())


@contextmanager
def _marked(model: Transformer, marks: list[Any]) -> Iterator[None]:
    def mark(*_: Any) -> None:
        _mark(model.device, marks)

    handles = []
    for layer in model.layers:
        handles.append(layer.register_forward_pre_hook(mark))
        handles.append(layer.mlp_norm.register_forward_pre_hook(mark))
        handles.append(layer.register_forward_hook(mark))
    if model.few_rows is not None:
        model.few_rows.mark = mark
    try:
        yield
    finally:
        if model.few_rows is not None:
            model.few_rows.mark = None
        for handle in handles:
            handle.remove()
