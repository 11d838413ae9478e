"""Each claim with ours beside it, and a verdict: the page people came for.

reproduced        same weights and setting, ours within the claim's tolerance
off               same weights and setting, ours outside it; by how much
predicted         T/NFE as claimed, step times ours: speedup = T/NFE / (own step / AR step)
flagged           same weights and setting, but a validity flag spoils ours: shown, not compared
different weights the same method and quantity on other weights: beside it, not judged
different setting the same weights, but other problems, length or hardware: not judged
not run           nothing of ours; `needs` says what it would take

Rules in docs/metrics.md. No torch, no pandas.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.claims import (
    SHAPES,
    Claim,
    Finding,
    Property,
    load_claims,
    load_findings,
    load_properties,
)
from bench.claims_ours import (
    LENGTHS,
    Observed,
    committed_records,
    observe_all,
    shape_of,
)
from tidar_ref.errors import UserError

REPRODUCED, OFF, PREDICTED, FLAGGED = "reproduced", "off", "predicted", "flagged"
OTHER_WEIGHTS, OTHER_SETTING, NOT_RUN = "different weights", "different setting", "not run"
VERDICTS = (REPRODUCED, OFF, PREDICTED, FLAGGED, OTHER_WEIGHTS, OTHER_SETTING, NOT_RUN)
# Numbers that depend on the machine as well as on the weights; the claims are of an H100.
TIMED = {"speedup", "tokens_per_s", "latency", "time", "step_ratio"}
PROTOCOL = ("shots", "length_limit")  # how a task is run, whatever the weights
STEP_COSTS = ("step_ratio", "latency")  # the shape of the weights decides them, not their values
# Systems of the paper that our AR rows, whatever their weights, are the counterpart of.
AR_COUNTERPARTS = ("Qwen2.5 1.5B", "Qwen2.5 1.5B fine-tuned", "Qwen3 8B")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim, our number beside it, the verdict and its reason.

    `ours` is in the claim's unit; `difference` is ours minus the claim's value, only where the
    two are comparable (reproduced, off, predicted); `needs` is filled where a measurement lacks;
    `flags` names what spoils ours.
    """

    claim: Claim
    verdict: str
    ours: float | None
    low: float | None
    high: float | None
    n: int | None
    weights: str
    label: str
    record: str
    difference: float | None
    reason: str
    needs: str
    flags: tuple[str, ...]


def judge_all(claims: Sequence[Claim], observed: Sequence[Observed]) -> list[Judged]:
    """Every claim with its verdict, in the claims' order."""
    tokens = {_twin(claim): claim for claim in claims if claim.metric == "t_per_nfe"}
    return [_judge(claim, tokens.get(_twin(claim)), observed) for claim in claims]


def _twin(claim: Claim) -> tuple[Any, ...]:
    source = "Figure 4" if claim.source == "Abstract" else claim.source
    return source, claim.system, claim.task, claim.setting, claim.threshold


def _judge(claim: Claim, tokens: Claim | None, observed: Sequence[Observed]) -> Judged:
    if claim.metric in PROTOCOL:
        return _protocol(claim, observed)
    like = [item for item in observed if _same_quantity(claim, item)]
    same = [item for item in like if _same_weights(claim, item)]
    comparable = [item for item in same if not _setting_difference(claim, item)]
    if comparable:
        best = _best(comparable)
        return _beside(claim, best, FLAGGED) if best.spoiled else _compared(claim, best)
    if same:
        best = _best(same)
        return _beside(claim, best, OTHER_SETTING, _setting_difference(claim, best))
    predicted = _predicted(claim, tokens, observed)
    if predicted:
        return predicted
    others = [item for item in like if _counterpart(claim, item)]
    if others:
        best = _best(others)
        return _beside(claim, best, OTHER_WEIGHTS, f"{best.weights}, {best.tier} tier")
    return _judged(claim, NOT_RUN, needs=needs(claim))


def _protocol(claim: Claim, observed: Sequence[Observed]) -> Judged:
    mine = [item for item in observed if (item.metric, item.task) == (claim.metric, claim.task)]
    if not mine:
        return _judged(claim, NOT_RUN, needs=needs(claim))
    best = _best(mine)
    if best.whole:
        return _compared(claim, best)
    return _beside(claim, best, OTHER_SETTING, "a shorter length limit was asked for")


def _same_quantity(claim: Claim, item: Observed) -> bool:
    """Metric, task, method and the method's parameters as far as the claim states them."""
    if not claim.decoder or (claim.metric, claim.decoder) != (item.metric, item.decoder):
        return False
    if claim.task != item.task:
        return False
    if item.tier == "random" and claim.metric not in STEP_COSTS:
        return False
    if claim.metric == "latency":
        place = {"width": claim.width, "kv_len": claim.kv_len, **claim.settings}
        return all(item.params.get(name) in (wanted, None) or wanted is None
                   for name, wanted in place.items())  # fmt: skip
    if "outcomes" in item.params:  # the paper's layout is the dense one
        return False
    # What a step costs does not depend on beta beyond a few head rows.
    names = ("block_len",) if claim.metric in STEP_COSTS else ("block_len", "beta", "threshold")
    for name in names:
        wanted, given = getattr(claim, name), item.params.get(name)
        if wanted is not None and given is not None and float(wanted) != float(given):
            return False
        if wanted is not None and given is None:
            return False
    if claim.alpha not in (None, 1.0) and f"alpha{claim.alpha:g}" not in "".join(item.adapters):
        return False
    tuned = "fine-tuned" in claim.system
    if claim.decoder == "ar" and tuned != any("-ar" in name for name in item.adapters):
        return False  # the AR twin of a recipe is one thing, the base another, TiDAR's AR a third
    if claim.decoder == "ar" and item.adapters and not tuned:
        return False
    setting = claim.settings
    if setting.get("masking") == "random" and "random" not in "".join(item.adapters):
        return False
    return not setting.keys() & {"point", "draft", "gen_len", "temperature", "part", "region"}


def _same_weights(claim: Claim, item: Observed) -> bool:
    """The claim's public weights, untouched; for a step cost the same shape is enough."""
    if claim.metric in STEP_COSTS:
        return SHAPES.get(claim.size) == item.shape
    if not claim.weights or " + " in claim.weights or item.adapters:
        return False
    if item.tier in ("random", "local"):  # a folder's name is the caller's claim, not a proof
        return False
    return shape_of(claim.weights) == item.shape


def _counterpart(claim: Claim, item: Observed) -> bool:
    if claim.kind != "paper" or claim.metric in STEP_COSTS:
        return False
    return claim.decoder != "ar" or claim.system in AR_COUNTERPARTS


def _setting_difference(claim: Claim, item: Observed) -> str:
    """Why the same quantity on the same weights is still not the claimed one; empty if it is."""
    if claim.metric in TIMED and "H100" not in item.device:
        return f"measured on {item.device}, claimed for an H100"
    if claim.metric not in STEP_COSTS and not item.whole:
        return f"{item.n} problems of {item.task}, or a shorter length limit"
    return ""


def _best(items: Sequence[Observed]) -> Observed:
    """Clean numbers first, then whole runs, more problems, the newest record by name."""
    return max(items, key=lambda item: (not item.spoiled, item.whole, item.n, item.record))


def _compared(claim: Claim, item: Observed) -> Judged:
    gap = item.value - claim.value
    near = abs(gap) <= claim.tolerance
    within = f"within {claim.tolerance:g} {claim.unit}" if claim.tolerance else "exactly"
    reason = within if near else f"off by {gap:+.3g}"
    return _judged(claim, REPRODUCED if near else OFF, item, difference=gap, reason=reason)


def _beside(claim: Claim, item: Observed, verdict: str, reason: str = "") -> Judged:
    flags = f"flags: {', '.join(item.spoiled)}" if item.spoiled else ""
    reason = "; ".join(part for part in (reason, flags) if part)
    return _judged(claim, verdict, item, reason=reason, needs=needs(claim))


def _predicted(claim: Claim, tokens: Claim | None, observed: Sequence[Observed]) -> Judged | None:
    """Speedup from the claimed T/NFE and our step cost of the same shape, K and decoder."""
    if claim.metric != "speedup" or claim.decoder != "tidar" or tokens is None:
        return None
    costs = [
        item
        for item in observed
        if item.metric == "step_ratio"
        and item.decoder == claim.decoder
        and item.shape == SHAPES.get(claim.size)
        and item.params.get("block_len") == claim.block_len
        and "outcomes" not in item.params
        and not item.spoiled
    ]
    if not costs:
        return None
    cost = max(costs, key=lambda item: ("H100" in item.device, item.n, item.record))
    value = tokens.value / cost.value
    reason = f"T/NFE {tokens.value:g} as claimed, step {cost.value:.3g} AR steps on {cost.device}"
    return _judged(
        claim, PREDICTED, dataclasses.replace(cost, value=value, low=None, high=None),
        difference=value - claim.value, reason=reason, needs=needs(claim),
    )  # fmt: skip


def _judged(
    claim: Claim,
    verdict: str,
    item: Observed | None = None,
    *,
    difference: float | None = None,
    reason: str = "",
    needs: str = "",
) -> Judged:
    return Judged(
        claim=claim,
        verdict=verdict,
        ours=item.value if item else None,
        low=item.low if item else None,
        high=item.high if item else None,
        n=item.n if item else None,
        weights=item.weights if item else "",
        label=item.label if item else "",
        record=item.record if item else "",
        difference=difference,
        reason=reason,
        needs=needs,
        flags=item.spoiled if item else (),
    )


def needs(claim: Claim) -> str:
    """What a measurement of this claim takes: weights, code, hardware, and the command if any."""
    from bench.registry import decoder_names

    task = {"humaneval_plus": "humaneval"}.get(claim.task, claim.task)
    if claim.metric in PROTOCOL:
        if task not in LENGTHS:
            return f"task {task}, not in bench/tasks"
        return f"any weights: python -m bench run --profile paper --decoders ar --tasks {task}"
    known = claim.decoder in decoder_names()
    parts = []
    if claim.source == "Figure 1":
        return "one H100 and a width curve of random:qwen3-32b"
    if claim.metric == "step_ratio":
        words = f"--weights random:{SHAPES[claim.size]} --decoders ar,{_decoder(claim)}"
        return f"one H100: python -m bench run --profile smoke --device cuda {words} --fixed-length"
    if claim.weights:
        parts.append(f"weights {claim.weights}")
    elif claim.decoder in ("tidar", "block_diffusion", "ar"):
        maybe = claim.decoder == "tidar" and claim.size == "8B"
        hint = " (TiDAR-LM/TiDAR-8b on the hub may be them)" if maybe else ""
        parts.append(f"weights the authors have not published{hint}")
    if not claim.decoder:
        parts.append("a method outside this suite")
    elif not known:
        parts.append(f"decoder {claim.decoder}, not in baselines/")
    averages = task.startswith("average") or task.endswith("_average")
    ours = task in LENGTHS or task in ("average_5_tasks", "average_3_groups", "humaneval_average",
                                       "mbpp_average")  # fmt: skip
    if task and not ours:
        parts.append(f"{'tasks' if averages else 'task'} {task}, not in bench/tasks")
    if claim.metric in TIMED:
        parts.append("one H100" if claim.kind != "published" else "the hardware named")
    elif claim.size not in ("0.5B", "1B", "1.5B", "1.7B"):
        parts.append(f"memory for {claim.size} weights")
    if known and claim.weights and ours and " + " not in claim.weights:
        names = ",".join(LENGTHS) if averages else task
        names = names.replace("humaneval_plus,", "")
        decoders = "ar" if claim.decoder == "ar" else f"ar,{_decoder(claim)}"
        parts.append(
            f"python -m bench run --profile paper --weights {claim.weights} "
            f"--decoders {decoders} --tasks {names}"
        )
    return "; ".join(parts)


def _decoder(claim: Claim) -> str:
    given = [
        f"{name}={getattr(claim, name):g}"
        for name in ("block_len", "beta", "threshold")
        if getattr(claim, name) is not None
    ]
    return f"{claim.decoder}:{','.join(given)}" if given else claim.decoder


def page(records: Sequence[Path], *, form: str = "table", source: str | None = None) -> str:
    """What `bench claims` prints: committed records and `records`, form table, csv or json.

    UserError for a folder that is no record and for a source no claim has.
    """
    claims = load_claims()
    sources = tuple(dict.fromkeys(claim.source for claim in claims))
    if source is not None and source not in sources:
        raise UserError(f"no claim has the source {source!r}; choose one of {', '.join(sources)}")
    ours = (*committed_records(), *records)
    folders = {path.resolve(): path for path in ours}
    judged = judge_all(claims, observe_all(tuple(folders.values())))
    judged = [item for item in judged if source in (None, item.claim.source)]
    if form == "csv":
        return to_csv(judged)
    write = to_json if form == "json" else to_markdown
    return write(judged, load_findings(), load_properties())


def counts(judged: Sequence[Judged]) -> dict[str, int]:
    """Cells in all, cells with a number of ours, then each verdict; open is what is not judged."""
    tally = Counter(item.verdict for item in judged)
    return {
        "cells": len(judged),
        "with ours beside": sum(item.ours is not None for item in judged),
        "with verdict": tally[REPRODUCED] + tally[OFF] + tally[PREDICTED],
        **{verdict: tally[verdict] for verdict in VERDICTS},
        "open": tally[FLAGGED] + tally[OTHER_WEIGHTS] + tally[OTHER_SETTING] + tally[NOT_RUN],
    }


def to_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One flat dict per claim: the claim's columns, then `ours_*`, verdict, reason, needs."""
    return [
        {
            **dataclasses.asdict(item.claim),
            "ours": item.ours,
            "ours_low": item.low,
            "ours_high": item.high,
            "ours_n": item.n,
            "ours_weights": item.weights,
            "ours_decoder": item.label,
            "ours_record": item.record,
            "ours_flags": " ".join(item.flags),
            "verdict": item.verdict,
            "difference": item.difference,
            "reason": item.reason,
            "needs": item.needs,
        }
        for item in judged
    ]


def to_csv(judged: Sequence[Judged]) -> str:
    """`to_rows` as CSV, every digit; an empty cell is None."""
    rows = to_rows(judged)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_json(
    judged: Sequence[Judged], findings: Sequence[Finding], properties: Sequence[Property]
) -> str:
    """Counts, claims, findings and properties as one JSON object."""
    whole = {
        "counts": counts(judged),
        "claims": to_rows(judged),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "properties": [dataclasses.asdict(item) for item in properties],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(
    judged: Sequence[Judged], findings: Sequence[Finding], properties: Sequence[Property]
) -> str:
    """Counts, one table per source, properties, findings."""
    tally = counts(judged)
    lines = ["# Claims against measurements", ""]
    lines += [", ".join(f"{number} {name}" for name, number in tally.items()), ""]
    for source in dict.fromkeys(item.claim.source for item in judged):
        mine = [item for item in judged if item.claim.source == source]
        lines += [f"## {source} ({mine[0].claim.kind})", ""]
        lines += ["| system | task | setting | metric | claimed | ours | verdict | why or needs |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_line(item) for item in mine] + [""]
    lines += ["## Properties, proved on any weights", ""]
    lines += [f"- {item.claim} ({item.source}): `{item.test}`" for item in properties]
    lines += ["", "## Findings: the paper against itself", ""]
    lines += [f"- {finding.where}: {finding.what}" for finding in findings]
    return "\n".join(lines) + "\n"


def _line(item: Judged) -> str:
    claim = item.claim
    ours = ""
    if item.ours is not None:
        span = f" [{item.low:.3g}, {item.high:.3g}]" if item.low is not None and item.high else ""
        ours = f"{item.ours:.4g}{span} ({item.label}, n={item.n}, {item.record})"
    read = "" if claim.certainty == "text" else f" ({claim.certainty})"
    why = "; ".join(part for part in (item.reason, item.needs) if part)
    cells = (
        claim.system, claim.task, claim.setting_words, claim.metric,
        f"{claim.value:g} {claim.unit}{read}", ours, item.verdict, why,
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
