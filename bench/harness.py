"""Runs a profile: loads what it names, alternates decoders problem by problem, measures, scores.

`prepare` does everything that can fail for bad input, before the record folder exists;
`generate_all` adds one measurement per (decoder, task, problem, repeat); `score_all` grades the
stored texts, so score and speed come from the same generations. Printing is left to the caller.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import environment
from bench.memory import Peak
from bench.metrics import DEFINITIONS_VERSION
from bench.profiles import Profile, TaskSpec
from bench.records import (
    SCHEMA_VERSION,
    Measurement,
    RunHeader,
    ScoreRecord,
    StepRecord,
    ids_sha,
)
from bench.registry import build_decoder, check_decoder
from bench.store import Key, RunStore, planned_keys
from bench.telemetry import now
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.tasks.task import Problem, Task
    from tidar_ref.checkpoint import WeightsSource
    from tidar_ref.decoding import Decoder, GenerationTrace

DTYPES = ("float32", "bfloat16")
WARMUP_PROMPT = "Warm-up, not measured: count from one to ten.\none two three"
WARMUP_SECONDS = 10.0  # a busy machine may never be stable: then this ends the warm-up
WARMUP_STABLE = 0.10  # two rounds in a row within 10 % of each other end the warm-up


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can start: everything loaded and checked. `problems` and `prompts` by task.

    own_weights: by label, of the decoders that do not run on `loaded`.
    """

    profile: Profile
    device: str
    dtype: str
    loaded: Any
    tasks: dict[str, Task]
    problems: dict[str, list[Problem]]
    prompts: dict[tuple[str, str], list[int]]
    decoders: dict[str, Decoder]
    own_weights: dict[str, WeightsSource]
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Generations a complete run makes."""
        problems = sum(map(len, self.problems.values()))
        return problems * len(self.decoders) * self.profile.repeats


def resolve_device(name: str) -> str:
    """ "auto", "cpu", "cuda" or "cuda:N" to a device this machine has; UserError otherwise."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"unknown device {name!r}; choose cpu, cuda, cuda:N or auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} asked for, but torch sees no CUDA here; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} asked for, but there are {torch.cuda.device_count()} GPUs; "
            "use a smaller number"
        )
    return name


def check_profile(profile: Profile) -> None:
    """UserError for a decoder, parameter or count no run could have; loads no weights."""
    from bench.tasks import TASKS
    from tidar_ref.checkpoint import load

    if profile.dtype not in DTYPES:
        raise UserError(f"unknown dtype {profile.dtype!r}; choose one of {', '.join(DTYPES)}")
    for spec in profile.tasks:
        if spec.name not in TASKS:
            raise UserError(f"unknown task {spec.name!r}; choose one of {', '.join(TASKS)}")
        if spec.limit is not None and spec.limit < 1:
            raise UserError(f"limit {spec.limit} is below 1; give at least one problem")
    for name, value in (("max_new_tokens", profile.max_new_tokens), ("repeats", profile.repeats)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} is below 1; give at least 1")
    tiny = load("random:tiny")
    for spec in profile.decoders:
        check_decoder(spec, tiny.model, mask_token_id=tiny.source.mask_token_id)


def load_tasks(
    profile: Profile, *, data_dir: Path | None, tokenizer: Any
) -> tuple[dict[str, Task], dict[str, list[Problem]], list[str]]:
    """The profile's tasks with data, own problems in place of missing ones; notes say which."""
    from bench.tasks import load_task
    from bench.tasks.data import FILES, find

    specs: dict[str, TaskSpec] = {}
    notes = []
    for spec in profile.tasks:
        stand_in = dict(profile.fallback).get(spec.name)
        if stand_in and spec.name in FILES and find(spec.name, data_dir) is None:
            notes.append(f"no data for {spec.name}: our own problems ({stand_in}) run instead")
            spec = dataclasses.replace(spec, name=stand_in)
        specs.setdefault(spec.name, spec)
    tasks = {
        name: load_task(name, data_dir=data_dir, style=profile.style, tokenizer=tokenizer)
        for name in specs
    }
    problems = {name: task.problems(specs[name].limit) for name, task in tasks.items()}
    return tasks, problems, notes


def prepare(profile: Profile, *, data_dir: Path | None = None) -> Prepared:
    """Load weights and tasks, build decoders, tokenise every prompt; UserError for bad input."""
    from tidar_ref.checkpoint import load

    device = resolve_device(profile.device)
    check_profile(profile)
    loaded = load(profile.weights, device=device, dtype=profile.dtype, seed=profile.seed)
    tasks, problems, notes = load_tasks(profile, data_dir=data_dir, tokenizer=loaded.tokenizer)
    decoders, own_weights = build_decoders(profile, loaded, device=device)
    notes += _strange_heads(decoders, {label: loaded.source for label in decoders} | own_weights)
    prompts = {
        (name, problem.id): loaded.tokenizer.encode(problem.prompt)
        for name, chosen in problems.items()
        for problem in chosen
    }
    prepared = Prepared(
        profile=profile,
        device=device,
        dtype=profile.dtype,
        loaded=loaded,
        tasks=tasks,
        problems=problems,
        prompts=prompts,
        decoders=decoders,
        own_weights=own_weights,
        notes=tuple(notes),
    )
    _check_lengths(prepared)
    return prepared


def build_decoders(
    profile: Profile, loaded: Any, *, device: str
) -> tuple[dict[str, Decoder], dict[str, WeightsSource]]:
    """(label to decoder in the order given, label to weights of those that have their own).

    An adapter named by several decoders is loaded once, on the backbone before the profile's `+`.
    """
    from tidar_ref.checkpoint import load

    models = {None: loaded}
    base = profile.weights.partition("+")[0]
    for name in dict.fromkeys(spec.weights for spec in profile.decoders):
        if name is not None:
            models[name] = load(
                f"{base}+{name}", device=device, dtype=profile.dtype, seed=profile.seed
            )
    decoders = {}
    for spec in profile.decoders:
        own = models[spec.weights]
        decoders[spec.label] = build_decoder(
            spec, own.model, mask_token_id=own.source.mask_token_id
        )
    sources = {s.label: models[s.weights].source for s in profile.decoders if s.weights}
    return decoders, sources


def _strange_heads(
    decoders: Mapping[str, Decoder], sources: Mapping[str, WeightsSource]
) -> list[str]:
    """A note for each draft head that was trained for other weights: exact text, poor drafts."""
    notes = []
    for label, decoder in decoders.items():
        target = getattr(getattr(decoder, "drafter", None), "target", None)
        if target not in (None, [sources[label].sha256, *sources[label].adapters]):
            notes.append(f"the head of {label} was trained for other weights: poor drafts")
    return notes


def _check_lengths(prepared: Prepared) -> None:
    room = prepared.loaded.model.config.max_position
    for task, problems in prepared.problems.items():
        for problem in problems:
            prompt = len(prepared.prompts[task, problem.id])
            new = token_limit(prepared.profile, problem)
            for label, decoder in prepared.decoders.items():
                if prompt + new + decoder.scratch > room:
                    raise UserError(
                        f"{task} {problem.id} has a prompt of {prompt} tokens, and with {new} new "
                        f"ones and {decoder.scratch} scratch slots of {label} that is more than "
                        f"the model's {room} positions; lower --max-new-tokens or drop the task"
                    )


def token_limit(profile: Profile, problem: Problem) -> int:
    """New tokens allowed for this problem: its own limit, capped by the profile's (count)."""
    if profile.max_new_tokens is None:
        return problem.max_new_tokens
    return min(profile.max_new_tokens, problem.max_new_tokens)


def make_header(prepared: Prepared, argv: Sequence[str]) -> RunHeader:
    """The record's header for this run on this machine, free of the machine's own paths."""
    from tidar_ref.linear import kernel_route

    commit, dirty = environment.git_state(Path(__file__).resolve().parents[1])
    profile = dataclasses.asdict(prepared.profile)
    profile["weights"] = environment.portable(prepared.profile.weights)
    return RunHeader(
        schema=SCHEMA_VERSION,
        definitions=DEFINITIONS_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        argv=tuple(map(environment.portable, argv)),
        profile=profile,
        environment={
            **environment.describe(prepared.device),
            "kernels": kernel_route(prepared.loaded.model),
        },
        commit=commit,
        dirty=dirty,
        weights=_portable(prepared.loaded.source) or {},
        data={
            name: {
                **dataclasses.asdict(task.source),
                "path": environment.portable(task.source.path),
                "shots": task.shots,
                "ours": task.ours,
            }
            for name, task in prepared.tasks.items()
        },
        problems={
            name: tuple(problem.id for problem in chosen)
            for name, chosen in prepared.problems.items()
        },
        decoders={
            label: {
                "name": decoder.name,
                "params": dict(decoder.params),
                # On weights of its own it promises nothing about the run's `ar`.
                "lossless": decoder.lossless and label not in prepared.own_weights,
                "weights": _portable(prepared.own_weights.get(label)),
                **getattr(decoder, "provenance", {}),
            }
            for label, decoder in prepared.decoders.items()
        },
        dtype=prepared.dtype,
        device=prepared.device.partition(":")[0],
        seed=prepared.profile.seed,
    )


def _portable(source: WeightsSource | None) -> dict[str, Any] | None:
    """As a dict without the machine's own paths."""
    if source is None:
        return None
    values = dataclasses.asdict(source)
    return {k: environment.portable(v) if isinstance(v, str) else v for k, v in values.items()}


def warm_up(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Run each decoder on a prompt of its own until two rounds agree; gives rounds and tokens/s.

    None of it is measured or counted; the caller uses tokens_per_s only for its time estimate.
    """
    from tidar_ref.decoding import generate

    profile, found = prepared.profile, {}
    prompt = prepared.loaded.tokenizer.encode(WARMUP_PROMPT)
    for label, decoder in prepared.decoders.items():
        previous, rounds, rate = 0.0, 0, 0.0
        deadline = time.perf_counter() + WARMUP_SECONDS
        while rounds < profile.warmup_max_rounds and (not rounds or time.perf_counter() < deadline):
            [trace] = generate(decoder, [prompt], max_new_tokens=profile.warmup_tokens)
            rounds += 1
            seconds = trace.decode_s
            rate = (len(trace.token_ids) - 1) / seconds if seconds > 0 else 0.0
            if abs(seconds - previous) <= WARMUP_STABLE * seconds:
                break
            previous = seconds
        found[label] = {"rounds": rounds, "tokens_per_s": round(rate, 2)}
    return found


def generate_all(
    prepared: Prepared,
    store: RunStore,
    *,
    on_done: Callable[[Measurement], None] = lambda _: None,
) -> None:
    """Measure every planned key that the store lacks, decoders alternating on each problem."""
    by_id = {
        (task, problem.id): problem
        for task, problems in prepared.problems.items()
        for problem in problems
    }
    for key in planned_keys(store.header):
        if key in store.done:
            continue
        measurement, steps = measure(prepared, key, by_id[key[1], key[2]])
        store.append(measurement, steps)
        on_done(measurement)


def measure(prepared: Prepared, key: Key, problem: Problem) -> tuple[Measurement, list[StepRecord]]:
    """One generation, as its measurement and its step ledger."""
    from bench.tasks.stopping import make_stop
    from tidar_ref.decoding import Sampling, generate

    label, task, problem_id, repeat = key
    profile, tokenizer = prepared.profile, prepared.loaded.tokenizer
    prompt = prepared.prompts[task, problem_id]
    to_the_limit = profile.stopping == "fixed"
    peak = Peak(prepared.device)
    began_at = now()
    [trace] = generate(
        prepared.decoders[label],
        [prompt],
        max_new_tokens=token_limit(profile, problem),
        eos_ids=frozenset() if to_the_limit else frozenset(tokenizer.eos_token_ids),
        stop=None if to_the_limit else make_stop(tokenizer, prompt, problem.stop),
        sampling=Sampling(seed=profile.seed + repeat),
        clock=profile.clock,
    )
    ended_at = now()
    stops = () if to_the_limit else problem.stop
    row = summarise(key, problem, prompt, trace, tokenizer, stops, peak.bytes())
    row = dataclasses.replace(row, began_at=round(began_at, 4), ended_at=round(ended_at, 4))
    return row, ledger(key, trace)


def summarise(
    key: Key,
    problem: Problem,
    prompt: list[int],
    trace: GenerationTrace,
    tokenizer: Any,
    stops: tuple[str, ...],
    peak_memory_bytes: int | None,
) -> Measurement:
    """The measurement of one trace; every count comes from its steps."""
    from bench.tasks.stopping import final_text

    steps = trace.steps
    committed = [len(step.committed[0]) for step in steps]
    drafted = [step.drafted[0] for step in steps]
    accepted = [step.accepted[0] for step in steps]
    split = [(s.step_s, s.forward_s) for s in steps if s.step_s is not None]
    clocked = len(split) == len(steps) and trace.prefill.step_s is not None
    forward_s = sum(forward or 0.0 for _, forward in split) if clocked else None
    return Measurement(
        decoder=key[0],
        task=key[1],
        problem=key[2],
        repeat=key[3],
        prompt_sha=problem.prompt_sha,
        prompt_tokens=len(prompt),
        output_tokens=len(trace.token_ids),
        tokens_generated=trace.tokens_generated,
        decode_forwards=sum(step.target_forwards for step in steps),
        prefill_forwards=trace.prefill.target_forwards,
        draft_forwards=trace.prefill.draft_forwards + sum(s.draft_forwards for s in steps),
        drafted=sum(drafted),
        accepted=sum(accepted),
        acceptance_histogram=tuple(
            committed.count(length) for length in range(max(committed, default=-1) + 1)
        ),
        drafted_at=_by_position(drafted, drafted),
        accepted_at=_by_position(accepted, drafted),
        prefill_s=trace.prefill_s,
        decode_s=trace.decode_s,
        forward_s=forward_s,
        host_s=None if forward_s is None else sum(step for step, _ in split) - forward_s,
        finish=trace.finish,
        text=final_text(tokenizer, prompt, trace.token_ids, stops),
        token_ids_sha=ids_sha(trace.token_ids),
        peak_memory_bytes=peak_memory_bytes,
        tokens_processed=sum(step.target_forwards * step.query_width for step in steps),
    )


def _by_position(counts: list[int], drafted: list[int]) -> tuple[int, ...]:
    """How many steps reached each draft position: a step with count n reaches 0..n-1."""
    width = max(drafted, default=0)
    return tuple(sum(count > position for count in counts) for position in range(width))


def ledger(key: Key, trace: GenerationTrace) -> list[StepRecord]:
    """The prefill (index 0) and decode steps of a single-sequence trace."""
    return [
        StepRecord(
            decoder=key[0],
            task=key[1],
            problem=key[2],
            repeat=key[3],
            index=index,
            committed=step.committed[0],
            target_forwards=step.target_forwards,
            draft_forwards=step.draft_forwards,
            query_width=step.query_width,
            kv_len=step.kv_len[0],
            drafted=step.drafted[0],
            accepted=step.accepted[0],
            step_s=step.step_s,
            forward_s=step.forward_s,
            draft_tokens=None if step.draft_tokens is None else step.draft_tokens[0],
        )
        for index, step in enumerate((trace.prefill, *trace.steps))
    ]


def score_all(
    prepared: Prepared, store: RunStore, *, say: Callable[[str], None] = lambda _: None
) -> None:
    """Grade the stored texts of every decoder, write scores.jsonl (empty for fixed length)."""
    scores = []
    if prepared.profile.stopping == "task":
        for label in prepared.decoders:
            for name, task in prepared.tasks.items():
                for repeat in range(prepared.profile.repeats):
                    started = time.perf_counter()
                    scores += _score(store, label, task, repeat)
                    say(f"scored {name} by {label} in {time.perf_counter() - started:.1f} s")
    store.write_scores(scores)


def write_vocabulary(prepared: Prepared, store: RunStore) -> None:
    """Store the text of every token id the ledger names, so that a reader needs no tokenizer."""
    from bench.store import read_steps

    seen: set[int] = set()
    for step in read_steps(store.folder):
        seen.update(step.committed, step.draft_tokens or ())
    store.write_vocabulary({i: prepared.loaded.tokenizer.decode([i]) for i in sorted(seen)})


def _score(store: RunStore, label: str, task: Task, repeat: int) -> list[ScoreRecord]:
    texts = {
        row.problem: row.text
        for row in store.measurements
        if (row.decoder, row.task, row.repeat) == (label, task.name, repeat)
    }
    return [
        ScoreRecord(
            decoder=label,
            task=score.task,
            repeat=repeat,
            metric=score.metric,
            variant=score.variant,
            harness=score.harness,
            headline=score.headline,
            per_problem=dict(score.per_problem),
        )
        for score in task.score(texts)
    ]
