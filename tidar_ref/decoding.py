"""The decoder protocol, the step ledger, and `generate`: the only generation loop of the suite.

A decoder knows prompts, logits and caches. Limits, stop conditions, trimming and the clock belong
to the loop: every method is stopped, counted and timed alike (definitions: docs/metrics.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tidar_ref.cache import KVCache
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

CLOCKS = ("total", "per_step")


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One turn of a decoder over B sequences; every reported number is derived from these.

    committed: per sequence, the tokens this step made final (empty once a sequence is finished).
    target_forwards, draft_forwards: network evaluations of the backbone and of a separate drafter.
    query_width: tokens a sequence sent through the target. kv_len: prefix length it read.
    drafted, accepted: draft tokens verified in this step and how many of them were right.
    draft_tokens: those drafted tokens in order, accepted ones first; None where a decoder does not
    tell. They serve to show a decode, no number is made from them.
    step_s, forward_s: seconds of the step and of the backbone in it; None in clock mode "total".
    """

    committed: tuple[tuple[int, ...], ...]
    target_forwards: int
    draft_forwards: int = 0
    query_width: int
    kv_len: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    draft_tokens: tuple[tuple[int, ...], ...] | None = None
    step_s: float | None = None
    forward_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationTrace:
    """One finished sequence. token_ids is cut after end-of-sequence, stop string or limit.

    The token that completes a stop condition is kept (AR has to produce it too).
    tokens_generated also counts what was committed past the cut. Seconds exclude nothing: decode_s
    runs from the end of the prefill to the end of the step that finished the sequence.
    """

    prompt_tokens: int
    token_ids: tuple[int, ...]
    tokens_generated: int
    prefill: StepTrace
    steps: tuple[StepTrace, ...]
    prefill_s: float
    decode_s: float
    finish: str  # "eos" | "stop" | "length"


@dataclass(kw_only=True)
class State:
    """What every decoder keeps between steps. active[b] is False once sequence b is finished."""

    cache: KVCache
    active: list[bool]
    sampling: Sampling
    generator: torch.Generator


class Decoder(Protocol):
    """A decoding method on a backbone.

    lossless: in exact arithmetic the output equals greedy AR's of the same weights.
    scratch: cache slots needed behind the last committed token.
    """

    name: str
    params: Mapping[str, Any]
    model: Any
    lossless: bool
    scratch: int

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[State, StepTrace]:
        """Read the prompts and commit the first new token of each."""
        ...

    def step(self, state: State) -> StepTrace:
        """One turn: verify, draft, denoise, whatever it is; commits at least nothing."""
        ...


StopRule = Callable[[list[int], int], int | None]


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    stop: Callable[[], StopRule] | None = None,
    sampling: Sampling | None = None,
    clock: str = "total",
    on_step: Callable[[State, StepTrace], None] | None = None,
) -> list[GenerationTrace]:
    """Decode B prompts until each has met end-of-sequence, its stop rule, or `max_new_tokens`.

    stop: makes a fresh rule per sequence; rule(token_ids, new) is told all generated tokens and how
    many are new, and answers how many to keep, or None. clock "per_step" synchronises and times
    every step and the backbone inside it; "total" times the whole (the headline's mode).
    """
    _check(prompts, max_new_tokens, clock, decoder.model.config.vocab_size)
    _check_masks(prompts, getattr(decoder.model, "mask_adapter", None))
    sampling = sampling or Sampling()
    rows = [_Sequence(stop() if stop else None, eos_ids, max_new_tokens) for _ in prompts]
    device = decoder.model.device
    with torch.inference_mode(), _forward_clock(decoder.model, clock) as spent:
        started = _now(device)
        state, prefill = decoder.prefill(
            [list(p) for p in prompts], max_new_tokens=max_new_tokens, sampling=sampling
        )
        prefilled = _now(device)
        prefill = _timed(prefill, clock, prefilled - started, spent)
        _collect(rows, state, prefill, prefilled, step=False)
        while any(state.active):
            before = _now(device) if clock == "per_step" else 0.0
            step = decoder.step(state)
            now = _now(device)
            step = _timed(step, clock, now - before, spent)
            _collect(rows, state, step, now, step=True)
            if on_step is not None:
                on_step(state, step)
        return [
            row.trace(len(prompt), prefill, prefilled - started, prefilled, index)
            for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]


class _Sequence:
    """Bookkeeping of one row: tokens so far, when and why it ended."""

    def __init__(self, rule: StopRule | None, eos_ids: frozenset[int], limit: int) -> None:
        self.rule, self.eos_ids, self.limit = rule, eos_ids, limit
        self.tokens: list[int] = []
        self.steps: list[StepTrace] = []
        self.finish: str | None = None
        self.keep = 0
        self.ended_at = 0.0

    def add(self, new: tuple[int, ...]) -> None:
        """Append committed tokens and decide whether, where and why the sequence ends."""
        if not new:  # a denoising step may settle nothing, and nothing new ends nothing
            return
        start = len(self.tokens)
        self.tokens.extend(new)
        ends = []
        for offset, token in enumerate(new):
            if token in self.eos_ids:
                ends.append((start + offset + 1, 0, "eos"))
                break
        kept = self.rule(self.tokens, len(new)) if self.rule else None
        if kept is not None:
            ends.append((kept, 1, "stop"))
        if len(self.tokens) >= self.limit:
            ends.append((self.limit, 2, "length"))
        if ends:
            self.keep, _, self.finish = min(ends)

    def trace(
        self, prompt_tokens: int, prefill: StepTrace, prefill_s: float, prefilled: float, row: int
    ) -> GenerationTrace:
        return GenerationTrace(
            prompt_tokens=prompt_tokens,
            token_ids=tuple(self.tokens[: self.keep]),
            tokens_generated=len(self.tokens),
            prefill=_row(prefill, row),
            steps=tuple(_row(step, row) for step in self.steps),
            prefill_s=prefill_s,
            decode_s=self.ended_at - prefilled,
            finish=self.finish or "length",
        )


def _collect(
    rows: list[_Sequence], state: State, trace: StepTrace, now: float, *, step: bool
) -> None:
    for index, row in enumerate(rows):
        if not state.active[index]:
            continue
        if step:
            row.steps.append(trace)
        row.add(trace.committed[index])
        row.ended_at = now
        if row.finish:
            state.active[index] = False


def _row(step: StepTrace, index: int) -> StepTrace:
    if len(step.committed) == 1:
        return step
    return replace(
        step,
        committed=(step.committed[index],),
        kv_len=(step.kv_len[index],),
        drafted=(step.drafted[index],),
        accepted=(step.accepted[index],),
        draft_tokens=None if step.draft_tokens is None else (step.draft_tokens[index],),
    )


def _timed(step: StepTrace, clock: str, seconds: float, spent: list[float]) -> StepTrace:
    if clock == "total":
        return step
    step = replace(step, step_s=seconds, forward_s=sum(spent))
    spent.clear()
    return step


@contextmanager
def _forward_clock(model: Any, clock: str) -> Iterator[list[float]]:
    """In clock mode "per_step", time every backbone and LM-head call into the yielded list."""
    spent: list[float] = []
    if clock == "total":
        yield spent
        return

    def timed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            started = _now(model.device)
            result = call(*args, **kwargs)
            spent.append(_now(model.device) - started)
            return result

        return wrapper

    parts = (model, model.lm_head)
    for part in parts:
        part.forward = timed(part.forward)
    try:
        yield spent
    finally:
        for part in parts:
            del part.forward  # the class's own method shows again


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, clock: str, vocab_size: int
) -> None:
    if clock not in CLOCKS:
        raise UserError(f"clock {clock!r} is unknown: use one of {', '.join(CLOCKS)}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    if not prompts:
        raise UserError("no prompt given: pass at least one list of token ids")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {index} is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise UserError(
                f"prompt {index} has token ids in {min(prompt)}..{max(prompt)} but the vocabulary"
                f" has {vocab_size}: use the tokenizer of these weights"
            )


def _check_masks(prompts: Sequence[Sequence[int]], adapter: Any) -> None:
    """An adapter gated to masks would take a mask token of the prompt for one of the decoder's."""
    if adapter is None:
        return
    for index, prompt in enumerate(prompts):
        if adapter.token_id in prompt:
            raise UserError(
                f"prompt {index} contains the mask token {adapter.token_id}, on which the adapter"
                " of these weights acts: remove it from the text"
            )
