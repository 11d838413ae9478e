"""`bench audit`: do the lossless decoders of a record give greedy AR's tokens, and if not, why not.

"Lossless" is a promise of exact arithmetic. Forwards of different widths round differently, so
two tokens that are nearly tied may swap. The audit finds the first token at which an output leaves
`ar`'s, evaluates the weights there, and calls it

- `tie-level` if both tokens are so near the best one that rounding can swap them;
- `bug` otherwise, and whenever one output ends where the other goes on.

Near is measured, not guessed: `bench.ties` compares the weights in the record's dtype with the same
weights in a wider one, over the prompt and the output up to there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.records import RunHeader, ids_sha
from bench.store import Key, RunRecord, read_record, read_steps, write_whole
from bench.ties import WIDER, Judge
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from tidar_ref.model import Transformer

REFERENCE = "ar"
AUDIT = "audit.json"
WEIGHTS_MUST_MATCH = ("sha256", "parameters", "adapters", "mask_token_id")
TIE, BUG = "tie-level", "bug"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place where an output leaves `ar`'s; position counts output tokens from 0.

    A token is None where that output has ended. gap: how far, in the wider dtype, the worse of
    the two tokens lies behind the best logit; top_two: how far the second best token does.
    """

    decoder: str
    task: str
    problem: str
    repeat: int
    position: int
    ar_token: int | None
    token: int | None
    gap: float | None
    top_two: float | None
    tolerance: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class DecoderAudit:
    """One lossless decoder: outputs compared with `ar`'s, and those that differ."""

    decoder: str
    compared: int
    diverging: int
    tie_level: int
    bugs: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A record's audit; `dtype` is the record's, `wider` the one that judged."""

    record: str
    dtype: str
    wider: str
    decoders: tuple[DecoderAudit, ...]
    divergences: tuple[Divergence, ...]

    @property
    def bugs(self) -> int:
        """Outputs that rounding does not explain."""
        return sum(decoder.bugs for decoder in self.decoders)


# --- reading -----------------------------------------------------------------------------------


def outputs(folder: Path, record: RunRecord) -> dict[Key, tuple[int, ...]]:
    """Kept token ids of every finished generation, put together from its steps.

    UserError if they are not the ids whose checksum the measurement holds.
    """
    committed: dict[Key, list[int]] = defaultdict(list)
    for step in read_steps(folder):
        committed[step.key] += step.committed
    found = {}
    for row in record.measurements:
        tokens = tuple(committed[row.key][: row.output_tokens])
        if ids_sha(tokens) != row.token_ids_sha:
            raise UserError(
                f"the steps of {' '.join(map(str, row.key))} in {record.name} do not make the "
                "tokens its measurement names; the record is damaged, run again"
            )
        found[row.key] = tokens
    return found


def first_difference(ours: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs or is there in one only; None if equal."""
    for index, (a, b) in enumerate(zip(ours, reference, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(reference) else min(len(ours), len(reference))


def lossless(header: RunHeader) -> list[str]:
    """Labels of the decoders that promise `ar`'s output; UserError without `ar` or any of them."""
    found = [
        label for label, made in header.decoders.items() if made["lossless"] and label != REFERENCE
    ]
    if REFERENCE not in header.decoders or not found:
        raise UserError(
            "nothing to audit: the record needs `ar` and a lossless decoder, and has "
            f"{' '.join(header.decoders)}"
        )
    return found


# --- judging -----------------------------------------------------------------------------------


def judged(
    folder: Path, record: RunRecord, prompts: Mapping[tuple[str, str], list[int]], judge: Judge
) -> Iterator[Divergence]:
    """Every divergence of the record's lossless decoders; prompts by (task, problem)."""
    found = outputs(folder, record)
    for label in lossless(record.header):
        for key, ours in found.items():
            expected = found.get((REFERENCE, *key[1:]))
            if key[0] != label or expected is None:
                continue
            at = first_difference(ours, expected)
            if at is None:
                continue
            pair = [tokens[at] if at < len(tokens) else None for tokens in (expected, ours)]
            gap = top_two = tolerance = None
            if None not in pair:
                context = [*prompts[key[1], key[2]], *ours[:at]]
                gap, top_two, tolerance = judge.gaps(context, pair)
            yield Divergence(
                decoder=label,
                task=key[1],
                problem=key[2],
                repeat=key[3],
                position=at,
                ar_token=pair[0],
                token=pair[1],
                gap=gap,
                top_two=top_two,
                tolerance=tolerance,
                verdict=TIE if gap is not None and gap <= tolerance else BUG,
            )


def summed(record: RunRecord, wider: str, divergences: Sequence[Divergence]) -> Audit:
    """The audit of a record from its divergences."""
    pairs = {row.pair for row in record.measurements if row.decoder == REFERENCE}
    decoders = []
    for label in lossless(record.header):
        mine = [d for d in divergences if d.decoder == label]
        decoders.append(
            DecoderAudit(
                decoder=label,
                compared=sum(
                    row.decoder == label and row.pair in pairs for row in record.measurements
                ),
                diverging=len(mine),
                tie_level=sum(d.verdict == TIE for d in mine),
                bugs=sum(d.verdict == BUG for d in mine),
            )
        )
    return Audit(
        record=record.name,
        dtype=record.header.dtype,
        wider=wider,
        decoders=tuple(decoders),
        divergences=tuple(divergences),
    )


# --- a record ----------------------------------------------------------------------------------


def audit(
    folder: Path, *, weights: str | None = None, device: str = "auto", data_dir: Path | None = None
) -> Audit:
    """Audit a record and write `audit.json` into its folder.

    weights: where the record's weights are now, if not where its profile says. UserError if they
    or the problems are not those of the record.
    """
    record = read_record(folder)
    lossless(record.header)
    found = outputs(folder, record)
    expected = {key[1:]: tokens for key, tokens in found.items() if key[0] == REFERENCE}
    equal = all(
        first_difference(tokens, expected[key[1:]]) is None
        for key, tokens in found.items()
        if key[0] in lossless(record.header) and key[1:] in expected
    )
    divergences: list[Divergence] = []
    if not equal:  # only then the weights are needed
        model, prompts = _loaded(record, weights, device, data_dir)
        judge = Judge(model, record.header.dtype)
        divergences = list(judged(folder, record, prompts, judge))
    made = summed(record, WIDER[record.header.dtype], divergences)
    write_whole(folder / AUDIT, json.dumps(asdict(made), indent=1) + "\n")
    return made


def _loaded(
    record: RunRecord, weights: str | None, device: str, data_dir: Path | None
) -> tuple[Transformer, dict[tuple[str, str], list[int]]]:
    from bench.harness import resolve_device
    from bench.tasks import load_task
    from tidar_ref.checkpoint import load

    header = record.header
    spec = weights or header.profile["weights"]
    loaded = load(spec, device=resolve_device(device), dtype=header.dtype, seed=header.seed)
    fields = WEIGHTS_MUST_MATCH + (("name",) if loaded.source.sha256 is None else ())
    for name, value in asdict(loaded.source).items():
        stored = header.weights.get(name, value)
        stored = tuple(stored) if isinstance(stored, list) else stored
        if name in fields and stored != value:
            raise UserError(
                f"weights {spec!r} have {name} {value} and the record's had {stored}; "
                "name the record's weights with --weights"
            )
    shas = {(row.task, row.problem): row.prompt_sha for row in record.measurements}
    prompts = {}
    for task in header.problems:
        made = load_task(
            task, data_dir=data_dir, style=header.profile["style"], tokenizer=loaded.tokenizer
        )
        for problem in made.problems():
            stored = shas.pop((task, problem.id), None)
            if stored is None:
                continue
            if stored != problem.prompt_sha:
                raise UserError(
                    f"the prompt of {task} {problem.id} is no longer the record's; use the commit "
                    f"and the data named in {record.name}"
                )
            prompts[task, problem.id] = loaded.tokenizer.encode(problem.prompt)
    if shas:
        raise UserError(f"problem {' '.join(next(iter(shas)))} of the record is not in the data")
    return loaded.model, prompts


def to_markdown(made: Audit) -> str:
    """The audit as two tables: per decoder, and every divergence."""
    lines = [
        f"# Lossless audit of {made.record}",
        "",
        f"Against `{REFERENCE}`, {made.dtype}; near-ties judged in {made.wider}.",
        "",
        "| decoder | compared | differ | share | tie-level | bug |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for d in made.decoders:
        share = f"{100 * d.diverging / d.compared:.0f} %" if d.compared else ""
        lines.append(
            f"| {d.decoder} | {d.compared} | {d.diverging} | {share} | {d.tie_level} | {d.bugs} |"
        )
    if made.divergences:
        lines += [
            "",
            "| decoder | output | token | ar | own | gap | top-two gap | tolerance | verdict |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for d in made.divergences:
        repeat = f" #{d.repeat}" if d.repeat else ""
        words = [d.decoder, f"{d.task} {d.problem}{repeat}", d.position]
        words += ["ended" if token is None else token for token in (d.ar_token, d.token)]
        words += ["" if v is None else f"{v:.3g}" for v in (d.gap, d.top_two, d.tolerance)]
        lines.append("| " + " | ".join(map(str, [*words, d.verdict])) + " |")
    return "\n".join(lines) + "\n"
