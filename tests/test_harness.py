"""The run itself, on a tiny random backbone and a made-up task: counts, order, resuming."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import harness, memory
from bench.memory import Peak
from bench.profiles import (
    PROFILES,
    SMOKE,
    DecoderSpec,
    TaskSpec,
    get_profile,
    parse_decoders,
    tidar,
)
from bench.records import Measurement, ids_sha
from bench.registry import build_decoder, decoder_names
from bench.store import RunStore, planned_keys, read_record, read_steps
from bench.tasks.task import DataSource, Problem, Score, prompt_sha
from tidar_ref.checkpoint import load
from tidar_ref.config import ModelConfig
from tidar_ref.decoding import GenerationTrace, StepTrace
from tidar_ref.errors import UserError
from tidar_ref.model import Transformer
from tidar_ref.training import adapters


class Letters:
    """One token per byte; nothing ends a text by itself."""

    eos_token_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Echo:
    """A task whose score is whether a text is longer than ten characters."""

    name, shots, ours = "echo", 0, True
    source = DataSource(kind="own", path="echo", sha256="0", checked=True)

    def problems(self, limit: int | None = None) -> list[Problem]:
        texts = ["first prompt", "the second", "and a third one"][:limit]
        return [
            Problem(
                task="echo",
                id=str(number),
                prompt=text,
                stop=("\n\n\n",),
                max_new_tokens=40,
                prompt_sha=prompt_sha(text),
            )
            for number, text in enumerate(texts)
        ]

    def score(self, texts: Mapping[str, str], *, progress: Any = None) -> list[Score]:
        return [
            Score(
                task="echo",
                metric="long",
                variant="raw",
                harness="test",
                per_problem={key: float(len(text) > 10) for key, text in texts.items()},
                headline=True,
            )
        ]


@dataclasses.dataclass(frozen=True)
class Source:
    tier: str = "random"
    name: str = "tiny"
    origin: str = "a seed"
    sha256: str | None = None
    mask_token_id: int = 258
    parameters: int = 1


def prepared(**changes: Any) -> harness.Prepared:
    """A run of ar and tidar K=4 on three problems."""
    torch.manual_seed(0)
    config = ModelConfig(
        family="llama", vocab_size=259, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4, norm_eps=1e-5, qkv_bias=False,
        qk_norm=False, tied_embeddings=True, max_position=512,
    )  # fmt: skip
    model = Transformer(config)
    model.init_random(0)
    loaded = SimpleNamespace(model=model, tokenizer=Letters(), source=Source())
    settings: dict[str, Any] = {"warmup_tokens": 4, "max_new_tokens": 12, **changes}
    profile = dataclasses.replace(SMOKE, **settings)
    problems = {"echo": Echo().problems()}
    return harness.Prepared(
        profile=profile,
        device="cpu",
        dtype="float32",
        loaded=loaded,
        tasks={"echo": Echo()},
        problems=problems,
        prompts={("echo", p.id): Letters().encode(p.prompt) for p in problems["echo"]},
        decoders=harness.build_decoders(profile, loaded, device="cpu")[0],
        own_weights={},
        notes=(),
    )


def run_all(
    ready: harness.Prepared, store: RunStore, on_done: Callable[[Measurement], None] | None = None
) -> None:
    harness.generate_all(ready, store, on_done=on_done or (lambda _: None))
    harness.score_all(ready, store)


def test_a_whole_run(tmp_path: Path) -> None:
    ready = prepared()
    store = RunStore.create(tmp_path / "r", harness.make_header(ready, ["run", "--out=/a/b"]))
    warm = harness.warm_up(ready)
    assert set(warm) == {"ar", "tidar:block_len=4,beta=1"}
    assert all(1 <= facts["rounds"] <= 5 for facts in warm.values())
    run_all(ready, store)
    store.close()
    record = read_record(tmp_path / "r")
    assert record.complete and ready.count == len(record.measurements) == 6
    assert [m.key for m in record.measurements] == planned_keys(record.header)
    assert record.header.argv == ("run", "--out=.../b")
    by_pair: dict[Any, list[Measurement]] = {}
    for m in record.measurements:
        by_pair.setdefault(m.pair, []).append(m)
    for ar, other in by_pair.values():
        assert ar.text == other.text and ar.token_ids_sha == other.token_ids_sha
        assert ar.decode_forwards == ar.output_tokens - 1
        assert ar.finish == other.finish
        assert ar.forward_s is None and ar.host_s is None
    steps = list(read_steps(tmp_path / "r"))
    for m in record.measurements:
        mine = [step for step in steps if step.key == m.key]
        tokens = [token for step in mine for token in step.committed]
        assert [step.index for step in mine] == list(range(m.decode_forwards + 1))
        assert len(tokens) == m.tokens_generated
        assert ids_sha(tokens[: m.output_tokens]) == m.token_ids_sha
        assert sum(m.acceptance_histogram) == m.decode_forwards
        assert (sum(m.drafted_at), sum(m.accepted_at)) == (m.drafted, m.accepted)
    assert {score.decoder for score in record.scores} == set(record.header.decoders)


def test_stopping_part_way_and_going_on_loses_nothing(tmp_path: Path) -> None:
    ready = prepared()
    whole = RunStore.create(tmp_path / "whole", harness.make_header(ready, []))
    run_all(ready, whole)
    whole.close()

    class Stop(Exception):
        pass

    for after in range(1, 6):
        folder = tmp_path / f"r{after}"
        store = RunStore.create(folder, harness.make_header(ready, []))
        seen: list[Measurement] = []

        def count(row: Measurement, seen: list[Measurement] = seen, after: int = after) -> None:
            seen.append(row)
            if len(seen) == after:
                raise Stop

        with pytest.raises(Stop):
            run_all(ready, store, count)
        store.close()
        again = RunStore.resume(folder, harness.make_header(ready, []))
        assert len(again.done) == after
        run_all(ready, again)
        again.close()
        pairs = zip(
            read_record(folder).measurements,
            read_record(tmp_path / "whole").measurements,
            strict=True,
        )
        assert all((a.key, a.text) == (b.key, b.text) for a, b in pairs)


def test_per_step_clock_splits_the_time(tmp_path: Path) -> None:
    ready = prepared(clock="per_step")
    measurement, steps = harness.measure(
        ready, ("ar", "echo", "0", 0), ready.problems["echo"][0]
    )
    assert measurement.forward_s is not None and measurement.host_s is not None
    assert measurement.forward_s > 0 and measurement.host_s >= 0
    assert measurement.forward_s + measurement.host_s <= measurement.decode_s * 1.001
    assert all(step.step_s is not None for step in steps)


def test_fixed_length_runs_to_the_limit_and_is_not_scored(tmp_path: Path) -> None:
    ready = prepared(stopping="fixed")
    store = RunStore.create(tmp_path / "r", harness.make_header(ready, []))
    run_all(ready, store)
    store.close()
    record = read_record(tmp_path / "r")
    assert {m.output_tokens for m in record.measurements} == {12}
    assert {m.finish for m in record.measurements} == {"length"}
    assert record.scores == ()


def test_a_trace_is_summed_by_hand() -> None:
    def step(committed: tuple[int, ...], drafted: int, accepted: int) -> StepTrace:
        return StepTrace(
            committed=(committed,),
            target_forwards=1,
            query_width=20,
            kv_len=(3,),
            drafted=(drafted,),
            accepted=(accepted,),
            step_s=0.2,
            forward_s=0.15,
        )

    trace = GenerationTrace(
        prompt_tokens=3,
        token_ids=(65, 66, 67, 68, 69),
        tokens_generated=7,
        prefill=step((65,), 0, 0),
        steps=(step((66, 67), 3, 1), step((68,), 3, 0), step((69, 70, 71), 3, 2)),
        prefill_s=0.2,
        decode_s=0.6,
        finish="length",
    )
    problem = Echo().problems()[0]
    m = harness.summarise(("tidar", "echo", "0", 0), problem, [1, 2, 3], trace, Letters(), (), None)
    assert (m.output_tokens, m.tokens_generated, m.decode_forwards) == (5, 7, 3)
    assert m.acceptance_histogram == (0, 1, 1, 1)
    assert (m.drafted, m.accepted, m.tokens_processed) == (9, 3, 60)
    assert (m.drafted_at, m.accepted_at) == ((3, 3, 3), (2, 1, 0))
    assert m.forward_s == pytest.approx(0.45) and m.host_s == pytest.approx(0.15)
    assert m.text == "ABCDE"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_is_of_one_generation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Peak("cpu").bytes()
    watch = Peak("cpu")
    # Not from the heap, which may hold as much from tests before.
    with mmap.mmap(-1, 320_000_000) as block:
        block.write(b"1" * len(block))
        inside = watch.bytes()
    after = Peak("cpu").bytes()
    assert before is not None and inside is not None and after is not None
    assert inside - before > 300e6 and inside - after > 300e6
    monkeypatch.setattr(memory, "OWN", tmp_path / "none")
    assert Peak("cpu").bytes() is None


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    ready = prepared()
    long = {key: ids * 60 for key, ids in ready.prompts.items()}
    with pytest.raises(UserError, match="512 positions"):
        harness._check_lengths(dataclasses.replace(ready, prompts=long))


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:a"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UserError, match="unknown device"):
        harness.resolve_device(name)


def test_unknown_dtype() -> None:
    profile = dataclasses.replace(PROFILES["smoke"], dtype="int8")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        harness.check_profile(profile)


def test_profiles_by_name() -> None:
    assert all(name == profile.name for name, profile in PROFILES.items())
    with pytest.raises(UserError, match="unknown profile 'x'; choose one of smoke"):
        get_profile("x")


def test_decoder_words() -> None:
    specs = parse_decoders(["ar,tidar:block_len=4,beta=1", "tidar:block_len=8,beta=0.5"])
    labels = [spec.label for spec in specs]
    assert labels == ["ar", "tidar:block_len=4,beta=1", "tidar:block_len=8,beta=0.5"]
    assert tidar(4).label == labels[1]
    for words in (["beta=1"], ["ar", "ar"], ["tidar:4"], [","]):
        with pytest.raises(UserError):
            parse_decoders(words)


def test_decoders_are_built_by_name() -> None:
    assert decoder_names()[:2] == ("ar", "tidar")
    model = prepared().loaded.model
    for spec, words in (
        (DecoderSpec(name="nope"), "unknown decoder 'nope'"),
        (DecoderSpec(name="ar", params=(("block_len", 4),)), "takes no parameter"),
        (DecoderSpec(name="tidar", params=(("size", 4),)), "no parameter"),
        (tidar(1), "block_len is 1"),
        (tidar(17), "block_len is 17"),
        (tidar(4, 1.5), "beta is 1.5"),
        (DecoderSpec(name="tidar", params=(("block_len", "four"),)), "not a number"),
    ):
        with pytest.raises(UserError, match=words):
            build_decoder(spec, model, mask_token_id=258)


def test_a_decoder_with_weights_of_its_own(tmp_path: Path) -> None:
    """It runs on base + its adapter, beside others on the run's weights; the header says so."""
    base, other = load("random:tiny"), load("random:tiny", seed=1)
    adapter, _ = adapters.difference(
        base.model.state_dict(), other.model.state_dict(), rank=64, mask_token_id=258
    )
    loud = {name: (a, 30 * b) for name, (a, b) in adapter.factors.items()}  # heard over the text
    adapter = dataclasses.replace(adapter, factors=loud)
    folder = adapters.save(adapter, tmp_path / "own", base.model.config, base="tiny", notes={})
    ar, own = DecoderSpec(name="ar"), DecoderSpec(name="ar", params=(("weights", str(folder)),))
    k4 = DecoderSpec(name="tidar", params=(("weights", str(folder)), ("block_len", 4)))
    profile = dataclasses.replace(
        SMOKE, decoders=(ar, own, k4), tasks=(TaskSpec(name="own_math", limit=2),)
    )
    ready = harness.prepare(profile)
    assert ready.decoders[own.label].model is ready.decoders[k4.label].model
    header = harness.make_header(ready, [])
    assert header.decoders["ar"]["weights"] is None
    named = header.decoders[k4.label]
    assert named["weights"]["adapters"][0].startswith("own sha256") and not named["lossless"]
    store = RunStore.create(tmp_path / "record", header)
    harness.generate_all(ready, store)
    texts = {row.key[:3]: row.token_ids_sha for row in store.measurements}
    alone = harness.prepare(
        dataclasses.replace(profile, weights=f"random:tiny+{folder}", decoders=(ar,))
    )
    for problem in ready.problems["own_math"]:
        key = ("own_math", problem.id)
        row, _ = harness.measure(alone, ("ar", *key, 0), problem)
        assert texts[own.label, *key] == texts[k4.label, *key] == row.token_ids_sha
        assert row.token_ids_sha != texts["ar", *key]


def test_a_head_of_other_weights_is_noted() -> None:
    """Known by sha256 and adapters; a head that names no target is nobody's business."""
    source = SimpleNamespace(sha256="s", adapters=("a sha256 1",))
    heads = {"its own": ["s", "a sha256 1"], "base": ["s"], "other": ["t", "a"], "unknown": None}
    decoders = {n: SimpleNamespace(drafter=SimpleNamespace(target=t)) for n, t in heads.items()}
    decoders["ar"] = SimpleNamespace()
    notes = harness._strange_heads(decoders, dict.fromkeys(decoders, source))
    assert [note.split()[3] for note in notes] == ["base", "other"]
