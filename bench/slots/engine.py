"""Runs a plan: loads each job's weights, visits its cells in shuffled rounds, stores every sample.

What cannot be measured (no memory, positions past the model's, a decoder that is not here) becomes
a visit that says so. Weights are random or real: keys and values are noise either way, because no
time depends on what they say, and a prefix of noise costs no prefill. Imports torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import environment, roofline
from bench.profiles import parse_decoders
from bench.registry import build_decoder
from bench.slots.plan import Cell, Job, Plan
from bench.slots.record import OK, SCHEMA, SlotsHeader, SlotsStore, Split, Visit
from bench.slots.split import median_split, split_run
from bench.slots.timing import FAR_LARGER, Clock, cache_bytes, ceilings
from bench.telemetry import now
from tidar_ref.cache import KVCache
from tidar_ref.checkpoint import LoadedModel, load
from tidar_ref.errors import UserError
from tidar_ref.graphed import StaticDecoder
from tidar_ref.linear import kernel_route
from tidar_ref.masks import causal_mask, decode_mask, decode_positions
from tidar_ref.model import Transformer
from tidar_ref.sampling import Sampling

TIDAR_WIDTHS = {k * (k + 1): k for k in range(2, 17)}
KEPT_FREE = 0.92  # share of the free memory a cell may be estimated to need
PROMPT = 2  # tokens; the rest of a decoder's prefix is noise put into its cache


class Budget:
    """Seconds a process may spend; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.ends = None if seconds is None else time.perf_counter() + seconds

    @property
    def over(self) -> bool:
        return self.ends is not None and time.perf_counter() >= self.ends


def make_header(plan: Plan, argv: Sequence[str]) -> SlotsHeader:
    """The record's header for this plan on this machine."""
    commit, dirty = environment.git_state(Path(__file__).resolve().parents[2])
    values = dataclasses.asdict(plan)
    for job in values["jobs"]:
        job["weights"] = environment.portable(job["weights"])
    return SlotsHeader(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        argv=tuple(map(environment.portable, argv)),
        plan=values,
        environment=environment.describe(plan.device),
        commit=commit,
        dirty=dirty,
        device=plan.device.partition(":")[0],
    )


def run(
    plan: Plan,
    store: SlotsStore,
    *,
    budget_s: float | None = None,
    on_visit: Callable[[Visit], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    rehearsal: bool = False,
) -> bool:
    """Measure what the store lacks; False if the budget ended it first."""
    budget, device = Budget(budget_s), torch.device(plan.device)
    if plan.ceilings and not (store.folder / "ceilings.json").exists():
        dtype = getattr(torch, plan.jobs[0].dtype)
        store.note_ceilings(ceilings(device, dtype, small=rehearsal))
    loaded: tuple[tuple[str, str], LoadedModel] | None = None
    with torch.inference_mode():
        for job in plan.jobs:
            if not _left(job, store):
                continue
            if budget.over:
                return False
            if loaded is None or loaded[0] != (job.weights, job.dtype):
                loaded = None  # give the memory back before the next weights arrive
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                say(f"{job.name}: loading {job.weights}")
                loaded = ((job.weights, job.dtype), _load(job, plan))
            store.note_model(environment.portable(job.weights), _describe(loaded[1]))
            began = now()
            finished = _Job(plan, job, loaded[1], store, budget, on_visit).run()
            store.note_window(job.name, began, now())
            if not finished:
                return False
    return True


def _left(job: Job, store: SlotsStore) -> bool:
    rounds = range(job.rounds)
    if any((*c.key, r) not in store.done and c.key not in store.failed
           for c in job.cells for r in rounds):  # fmt: skip
        return True
    return job.split and any(
        c.width and c.key not in store.split and c.key not in store.failed for c in job.cells
    )


def _load(job: Job, plan: Plan) -> LoadedModel:
    return load(job.weights, device=plan.device, dtype=job.dtype, seed=plan.seed)


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    source = {
        key: environment.portable(value) if isinstance(value, str) else value
        for key, value in dataclasses.asdict(loaded.source).items()
    }
    return {
        "source": source,
        "config": dataclasses.asdict(loaded.model.config),
        "kernels": kernel_route(loaded.model),
    }


class _Job:
    """One job on loaded weights: one K/V cache for all its forwards, cut to each length."""

    def __init__(
        self,
        plan: Plan,
        job: Job,
        loaded: LoadedModel,
        store: SlotsStore,
        budget: Budget,
        on_visit: Callable[[Visit], None],
    ) -> None:
        self.plan, self.job, self.store = plan, job, store
        self.budget, self.on_visit = budget, on_visit
        self.model, self.mask_id = loaded.model, loaded.source.mask_token_id
        self.device = self.model.device
        self.model.attention, self.model.compiled = job.attention, job.compiled
        weights = roofline.weight_bytes(self.model.config, job.dtype)
        cache = cache_bytes(self.device)
        self.clock = Clock(
            self.device,
            flush_bytes=2 * cache if cache and weights < FAR_LARGER * cache else 0,
        )
        self.refused = {cell.key: self._refusal(cell) for cell in job.cells}
        self.cache: KVCache | None = None
        self.warm: set[tuple[str, str, int]] = set()

    def run(self) -> bool:
        """All rounds, then the split; False if the budget ended them."""
        for round_ in range(self.job.rounds):
            for cell in self.plan.order(self.job, round_):
                if (*cell.key, round_) in self.store.done or cell.key in self.store.failed:
                    continue
                if self.budget.over:
                    return False
                visit = self._visit(cell, round_)
                self.store.append(visit)
                self.on_visit(visit)
        for cell in self.job.cells if self.job.split else ():
            if cell.width and cell.key not in self.store.split | self.store.failed:
                if self.budget.over:
                    return False
                self.store.append_split(self._split(cell))
        return True

    def _visit(self, cell: Cell, round_: int) -> Visit:
        blank = Visit(
            job=cell.job, what=cell.what, kv_len=cell.kv_len, batch=self.job.batch, round=round_,
            status=OK, flushed=self.clock.flushes,
        )  # fmt: skip
        refusal = self.refused[cell.key]
        if refusal:
            return dataclasses.replace(blank, status=refusal[0], detail=refusal[1])
        try:
            return self._forward(cell, blank) if cell.width else self._step(cell, blank)
        except torch.cuda.OutOfMemoryError:
            status, detail = "no memory", "the allocator refused while running"
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            status, detail = "no memory", "the allocator refused while running"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return dataclasses.replace(blank, status=status, detail=detail)

    def _forward(self, cell: Cell, blank: Visit) -> Visit:
        parts, mask = self._parts(cell)
        self._settle(cell, lambda: self.clock.run(parts)[1])
        runs = [self.clock.run(parts) for _ in range(self.job.samples)]
        return dataclasses.replace(
            blank,
            width=cell.width,
            forwards=1,
            head_rows=cell.width,
            mask=mask,
            total_s=tuple(sum(spent) for spent, _ in runs),
            head_s=tuple(spent[1] for spent, _ in runs),
            host_s=tuple(host for _, host in runs),
        )

    def _parts(self, cell: Cell) -> tuple[list[Callable[[], Any]], str]:
        """Backbone and head of a forward behind kv_len tokens; and the mask's name."""
        width, batch = cell.width or 1, self.job.batch
        cache = self._shared_cache()
        cache.advance([cell.kv_len - n for n in cache.lengths])
        block = TIDAR_WIDTHS.get(width)
        offsets = decode_positions(block) if block else torch.arange(width)
        mask = decode_mask(block) if block else causal_mask(width)
        mask = None if width == 1 else mask.to(self.device)
        positions = (cell.kv_len + offsets).to(self.device).expand(batch, width)
        ids = torch.randint(self.model.config.vocab_size, (batch, width), device=self.device)
        kept: list[Any] = []

        def backbone() -> None:
            kept[:] = [self.model(ids, positions, cache, mask)]

        def head() -> None:
            self.model.lm_head(kept[0])

        return [backbone, head], f"tidar K={block}" if block else "causal"

    def _shared_cache(self) -> KVCache:
        if self.cache is None:
            fit = [c for c in self.job.cells if c.width and not self.refused[c.key]]
            self.cache = KVCache(
                self.model.config,
                batch=self.job.batch,
                max_len=max(c.kv_len for c in fit),
                scratch=max(c.width or 1 for c in fit),
                dtype=self.model.dtype,
                device=self.device,
            )
            fill_with_noise(self.cache)
        return self.cache

    def _step(self, cell: Cell, blank: Visit) -> Visit:
        [spec] = parse_decoders([cell.what])
        try:
            decoder = build_decoder(spec, self.model, mask_token_id=self.mask_id)
            static = isinstance(decoder, StaticDecoder)
            if static:
                decoder.ahead = False  # the prompt's graphs are never replayed
        except UserError as error:
            return dataclasses.replace(blank, status="no decoder", detail=str(error))
        try:
            state, _ = decoder.prefill(
                [[1] * PROMPT] * self.job.batch,
                max_new_tokens=cell.kv_len,
                sampling=Sampling(seed=self.plan.seed),
            )
        except UserError as error:
            return dataclasses.replace(blank, status="no positions", detail=str(error))
        if not isinstance(getattr(state, "cache", None), KVCache):
            return dataclasses.replace(
                blank,
                status="not applicable",
                detail=f"{cell.what} keeps no KVCache, so its KV length cannot be set",
            )
        fill_with_noise(state.cache)
        trace: list[Any] = []
        steps = decoder.steps if static else 1

        def once() -> tuple[float, float]:
            """Seconds of a step; of static steps one N-th of N replays and one read."""
            if static:
                decoder.rewind(state, cell.kv_len)
            else:
                state.cache.advance([cell.kv_len - n for n in state.cache.lengths])
            spent, host = self.clock.run([lambda: trace.append(decoder.step(state))])
            return spent[0] / steps, host / steps

        self._settle(cell, lambda: once()[1])
        trace.clear()
        runs = [once() for _ in range(self.job.samples)]
        return dataclasses.replace(
            blank,
            width=trace[0].query_width,
            forwards=trace[0].target_forwards,
            steps=steps,
            captured=static and decoder.capture,
            mask="the decoder's",
            total_s=tuple(spent for spent, _ in runs),
            host_s=tuple(host for _, host in runs),
        )

    def _settle(self, cell: Cell, once: Callable[[], float]) -> None:
        """Warm up on the first visit of this process, one unrecorded run on later ones."""
        if cell.key in self.warm:
            once()
        else:
            self.clock.warm_up(once)
            self.warm.add(cell.key)

    def _split(self, cell: Cell) -> Split:
        [backbone, head], _ = self._parts(cell)
        runs = []
        for index in range(2 + self.job.samples):
            if self.clock.flushes:
                self.clock.waste.fill_(1)
            parts = split_run(self.model, backbone, head)
            if index >= 2:  # two to warm up
                runs.append(parts)
        seconds = median_split(runs)
        return Split(
            job=cell.job, what=cell.what, kv_len=cell.kv_len, batch=self.job.batch,
            width=cell.width or 1, n=len(runs), **{f"{k}_s": v for k, v in seconds.items()},
        )  # fmt: skip

    def _refusal(self, cell: Cell) -> tuple[str, str] | None:
        """(status, why) of a cell that cannot run; decoders that do not fit are tried."""
        config = self.model.config
        width = cell.width or 1
        if cell.kv_len + width > config.max_position:
            return "no positions", f"the model has {config.max_position} positions"
        need = cell_bytes(self.model, cell.kv_len, width, self.job.batch)
        free = free_bytes(self.device)
        if need > KEPT_FREE * free:
            return "no memory", f"estimated {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        return None


def cell_bytes(model: Transformer, kv_len: int, width: int, batch: int) -> int:
    """Memory a cell needs beyond the weights, estimated: cache, bias, logits, activations."""
    config, item = model.config, model.dtype.itemsize
    keys = kv_len + width
    name = str(model.dtype).removeprefix("torch.")
    cache = roofline.kv_bytes_per_token(config, name) * keys * batch
    bias = config.num_heads // config.num_kv_heads * width * keys * (2 * item + 1)
    logits = batch * width * config.vocab_size * (item + (4 if item < 4 else 0))
    inner = 3 * config.intermediate_size + 4 * config.hidden_size
    scores = batch * config.num_heads * width * keys * 4 if model.device.type == "cpu" else 0
    return cache + bias + logits + batch * width * inner * item + scores


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    import psutil

    return psutil.virtual_memory().available


def fill_with_noise(cache: KVCache) -> None:
    """Keys and values of unit noise: zeros would draw less power and flatter the clocks."""
    generator = torch.Generator(device=cache.k.device).manual_seed(0)
    for tensor in (cache.k, cache.v):
        block = torch.randn(tensor.shape[-2:], generator=generator, device=tensor.device)
        tensor.copy_(block.to(tensor.dtype).expand_as(tensor))
