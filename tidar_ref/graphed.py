"""Steps without the host: one CUDA graph replay each, several replays between two reads.

A decoder with a `turn` (`ar`, `tidar`) is run over static buffers: pending tokens, lengths and K/V
stay on the device, acceptance and the choice of the next draft too, and what each step committed
goes into a ring that the host reads every N steps. The turn is ordinary torch code, so the same
step also runs uncaptured on any device; that is how its equality with the eager step is proved.

    graphs=N   captured, CUDA only      static=N   the same steps, run eagerly

Rules. Greedy only. A sequence at its length limit is frozen on the device; end-of-sequence and stop
strings are seen when the ring is read. Steps replayed behind such an end are discarded: no ledger
counts them and `StaticState.discarded` tells how many, but their seconds stay in the decode time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from tidar_ref.cache import BoundedCache, KVCache
from tidar_ref.decoding import State, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.sampling import Sampling

GRANULE = 512  # slots; longer views grow by an eighth of a power of two
MOST_STEPS = 64
WARM_UPS = 3  # runs on a side stream before a capture, as torch asks for
STAND_INS = {"graphs": 0}  # parameters are checked on a model that is on no CUDA device


class Turning(Protocol):
    """What a decoder needs beside the protocol of `decoding`: its greedy step on the device.

    turn(held, cache) -> (held of the next step, committed [B], report [B, C]); `trace` makes a
    ledger line of a report that has reached the host. width: query tokens; most: commits a step;
    columns: C.
    """

    name: str
    params: Any
    model: Any
    lossless: bool
    scratch: int
    width: int
    most: int
    columns: int

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[State, StepTrace]: ...

    def held(self, state: Any) -> tuple[Tensor, ...]: ...

    def turn(
        self, held: tuple[Tensor, ...], cache: KVCache
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]: ...

    def trace(
        self,
        report: list[list[int]],
        lengths: list[int],
        before: tuple[int, ...],
        active: tuple[bool, ...],
    ) -> tuple[StepTrace, list[int], list[int]]: ...


def split_params(params: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """The parameters graphs and static, checked, and all the others."""
    burst = {name: params[name] for name in ("graphs", "static") if name in params}
    for name, value in burst.items():
        if not isinstance(value, int) or not 0 <= value <= MOST_STEPS:
            raise UserError(
                f"{name} is {value}: give the steps between two reads, 1 to {MOST_STEPS}, or 0"
                " for eager steps"
            )
    if len([value for value in burst.values() if value]) > 1:
        raise UserError("graphs and static exclude each other: graphs is captured, static is not")
    return burst, {name: value for name, value in params.items() if name not in burst}


def wrap(eager: Any, burst: dict[str, int]) -> Any:
    """The decoder itself, or its static form; UserError for graphs away from CUDA."""
    for name, steps in burst.items():
        if steps:
            return StaticDecoder(eager, steps=steps, capture=name == "graphs")
    return eager


def bucket(slots: int) -> int:
    """Slots of the smallest view that holds `slots`."""
    granule = max(GRANULE, (1 << (slots - 1).bit_length()) // 8)
    return -(-slots // granule) * granule


@dataclass(kw_only=True)
class Buffers:
    """What graphs read and write at fixed addresses, for one batch size and capacity.

    held: of the next step. left [B]: tokens until the limit, <= 0 for rows that are frozen.
    ring [N, B, 2 + C]: whether the row was live, tokens committed, the report. at [1]: next line.
    """

    cache: KVCache
    held: tuple[Tensor, ...]
    left: Tensor
    ring: Tensor
    at: Tensor
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)

    @property
    def small(self) -> tuple[Tensor, ...]:
        """All but keys and values."""
        return (*self.held, self.left, self.ring, self.at, self.cache.kv_len)


@dataclass(kw_only=True)
class StaticState(State):
    """State whose `cache.lengths` follow the ledger, while the device may be N steps ahead.

    reached: lengths on the device, known at the last read, or what they are at most. drafts: of
    the eager trace. queue: steps replayed, read and not given out. live: rows not frozen, as the
    device knows them. skipped: see `discarded`.
    """

    buffers: Buffers
    drafts: list[int]
    left: list[int]
    reached: list[int]
    live: list[bool]
    queue: deque[list[list[int]]] = field(default_factory=deque)
    skipped: int = 0

    @property
    def discarded(self) -> int:
        """Steps replayed behind the end of a sequence so far, each row counted singly."""
        return self.skipped + sum(row[0] for lines in self.queue for row in lines)


class StaticDecoder:
    """`eager` by static steps, `steps` of them between two reads. One generation at a time:
    a prefill takes the buffers over from the state before."""

    def __init__(self, eager: Turning, *, steps: int, capture: bool) -> None:
        device = eager.model.device
        if capture and device.type != "cuda":
            raise UserError(
                f"graphs={steps} captures CUDA graphs but the model is on {device}: use"
                f" --device cuda, or static={steps} for the same steps uncaptured"
            )
        self.eager, self.steps, self.capture = eager, steps, capture
        self.name, self.model = eager.name, eager.model
        self.lossless, self.scratch, self.width = eager.lossless, eager.scratch, eager.width
        mode = "graphs" if capture else "static"
        self.params = MappingProxyType({**eager.params, mode: steps})
        self.ahead = True  # capture in the prefill what the generation will need
        self.buffers: dict[int, Buffers] = {}  # by batch size
        self.owner: StaticState | None = None
        self.pool: Any = None

    def prefill(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling
    ) -> tuple[StaticState, StepTrace]:
        """The eager prefill, its result copied into the buffers; captures what is missing."""
        if sampling.mode != "greedy":
            raise UserError(
                f"sampling mode {sampling.mode} draws on the host's stream: static steps are greedy"
                " only, leave graphs and static away"
            )
        if "forward" in vars(self.model):
            raise UserError(
                "clock per_step times every step and forward, but these are replayed several at a"
                " time: use clock total"
            )
        eager, trace = self.eager.prefill(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        held = self.eager.held(eager)
        buffers = self._buffers(eager.cache, held)
        lengths = list(eager.cache.lengths)
        buffers.cache.kv_len.zero_()  # a capture must not write past the view it is for
        if self.capture and self.ahead:
            last = max(lengths) + max_new_tokens + self.width
            for slots in range(max(lengths) + self.width, last + 1):
                self._graph(buffers, min(bucket(slots), buffers.cache.k.shape[3]))
        slots = eager.cache.k.shape[3]
        buffers.cache.k[:, :, :, :slots].copy_(eager.cache.k)
        buffers.cache.v[:, :, :, :slots].copy_(eager.cache.v)
        for kept, new in zip(buffers.held, held, strict=True):
            kept.copy_(new)
        left = [max_new_tokens - 1] * len(prompts)
        state = StaticState(
            cache=buffers.cache,
            active=list(eager.active),
            sampling=sampling,
            generator=eager.generator,
            buffers=buffers,
            drafts=list(getattr(eager, "lengths", lengths)),
            left=left,
            reached=lengths,
            live=[True] * len(prompts),
        )
        _set(buffers, lengths, left)
        self.owner = state
        return state, trace

    def step(self, state: StaticState) -> StepTrace:
        """The next step of the queue, which is filled by a burst of replays when it is empty."""
        if state is not self.owner:
            raise ValueError("the buffers belong to a later prefill of this decoder")
        if not state.queue:
            self._burst(state)
        active, cache = tuple(state.active), state.cache
        lines = state.queue.popleft()
        state.skipped += sum(row[0] for row, a in zip(lines, active, strict=True) if not a)
        before = tuple(cache.lengths)
        reports = [line[2:] for line in lines]
        trace, counts, state.drafts = self.eager.trace(reports, state.drafts, before, active)
        cache.lengths = [n + c for n, c in zip(cache.lengths, counts, strict=True)]
        state.left = [n - c for n, c in zip(state.left, counts, strict=True)]
        return trace

    def rewind(self, state: StaticState, kv_len: int) -> None:
        """Put every row back behind `kv_len` cached tokens for one burst (of timing)."""
        rows = len(state.active)
        state.queue.clear()
        state.cache.lengths, state.reached = [kv_len] * rows, [kv_len] * rows
        state.left, state.live = [self.steps] * rows, [True] * rows
        # Rows freeze before their places could leave the cache; that changes no shape and no cost.
        room = state.cache.k.shape[3] - kv_len - self.width - self.eager.most + 1
        if room < 1:
            raise ValueError(f"no room for a step behind {kv_len} tokens: prefill for more")
        _set(state.buffers, state.reached, [room] * rows)

    def _burst(self, state: StaticState) -> None:
        """Replay up to N steps and read the ring: the only wait for the device."""
        buffers, most = state.buffers, self.eager.most
        ended = [live and not a for live, a in zip(state.live, state.active, strict=True)]
        if any(ended):
            keep = torch.tensor([not e for e in ended], device=buffers.left.device)
            buffers.left.mul_(keep)
        state.live = list(state.active)
        rows = [i for i, a in enumerate(state.active) if a]
        if not rows:
            raise ValueError("every sequence has ended: there is no step to make")
        # Every step commits at least one token, so more than this would be for nothing.
        count = min(self.steps, max(1, max(state.left[i] for i in rows)))
        buffers.at.zero_()
        capacity = buffers.cache.k.shape[3]
        for index in range(count):
            # A row that is behind its limit stays, so that no length outgrows the capacity.
            slots = max(state.reached) + index * most + self.width
            self._replay(buffers, min(bucket(slots), capacity))
        lines = buffers.ring[:count].tolist()
        for step in lines:
            state.reached = [n + row[1] for n, row in zip(state.reached, step, strict=True)]
        state.queue.extend(lines)

    def _replay(self, buffers: Buffers, bound: int) -> None:
        if self.capture:
            self._graph(buffers, bound).replay()
        else:
            self._turn(buffers, bound)

    def _turn(self, buffers: Buffers, bound: int) -> None:
        """One step over the buffers: what a graph holds."""
        live = (buffers.left > 0).long()
        following, committed, report = self.eager.turn(
            buffers.held, BoundedCache(buffers.cache, bound, self.width)
        )
        committed = committed * live
        line = torch.cat([live[:, None], committed[:, None], report], dim=1)
        buffers.ring.index_copy_(0, buffers.at, line[None])
        buffers.at.add_(1)
        buffers.cache.kv_len.add_(committed)
        buffers.left.sub_(committed)
        for kept, new in zip(buffers.held, following, strict=True):
            kept.copy_(new)

    def _graph(self, buffers: Buffers, bound: int) -> torch.cuda.CUDAGraph:
        """The graph of the view of `bound` slots, captured when it is first asked for."""
        if bound not in buffers.graphs:
            with torch.cuda.device(buffers.at.device):  # streams are made on the current one
                buffers.graphs[bound] = self._captured(buffers, lambda: self._turn(buffers, bound))
        return buffers.graphs[bound]

    def _captured(self, buffers: Buffers, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, capture, and put the buffers back as they were.

        Warm-up runs write K/V behind the committed ones only, where the next step writes anyway.
        """
        saved = [tensor.clone() for tensor in buffers.small]
        buffers.at.zero_()
        stream = torch.cuda.Stream(device=buffers.at.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
                for tensor, value in zip(buffers.small, saved, strict=True):
                    tensor.copy_(value)
                buffers.at.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        if self.pool is None:  # no graph's inside outlives its replay, so one pool serves all
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        for tensor, value in zip(buffers.small, saved, strict=True):
            tensor.copy_(value)
        return graph

    def _buffers(self, cache: KVCache, held: tuple[Tensor, ...]) -> Buffers:
        """Buffers of this batch size that hold such a cache; old ones if they are large enough."""
        layers, batch, heads, slots, dim = cache.k.shape
        capacity = bucket(slots + self.width)
        found = self.buffers.get(batch)
        if found is not None and found.cache.k.shape[3] >= capacity:
            return found
        self.buffers.pop(batch, None)
        kept = KVCache(
            self.model.config,
            batch=batch,
            max_len=cache.max_len,
            scratch=capacity - cache.max_len,
            dtype=cache.k.dtype,
            device=cache.k.device,
        )
        device = cache.k.device
        self.buffers[batch] = Buffers(
            cache=kept,
            held=tuple(tensor.clone() for tensor in held),
            left=torch.zeros(batch, dtype=torch.int64, device=device),
            ring=torch.zeros(
                self.steps, batch, 2 + self.eager.columns, dtype=torch.int64, device=device
            ),
            at=torch.zeros(1, dtype=torch.int64, device=device),
        )
        return self.buffers[batch]


def _set(buffers: Buffers, lengths: list[int], left: list[int]) -> None:
    device = buffers.at.device
    buffers.cache.lengths = list(lengths)
    buffers.cache.kv_len.copy_(torch.tensor(lengths, device=device))
    buffers.left.copy_(torch.tensor(left, device=device))
