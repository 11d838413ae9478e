"""Claims against measurements: every published number with a verdict from the page's records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report.markup import CAPTION, Folded, Part, Section, table

if TYPE_CHECKING:
    from bench.claims_verdict import Judged


def claims(folders: Sequence[Path]) -> Section:
    """Every published number beside ours, with a verdict: the records of this report only."""
    from bench import claims_verdict as verdict
    from bench.claims import load_claims, load_findings, load_properties
    from bench.claims_ours import observe_all

    judged = verdict.judge_all(load_claims(), observe_all(folders))
    tally = verdict.counts(judged)
    verdicts = [(name, str(tally[name]), MEANINGS[name]) for name in verdict.VERDICTS]
    parts: list[Part] = [
        f"All {tally['cells']} numbers of the paper, of its project page and of published rivals, "
        f"judged against the records of this report: {tally['with ours beside']} have a number of "
        f"ours beside, {tally['with verdict']} could be judged, {tally['open']} are open.",
        f"{CAPTION}claims by verdict\n\n{table(('verdict', 'cells', 'meaning'), verdicts)}",
    ]
    settled = (verdict.REPRODUCED, verdict.OFF, verdict.PREDICTED)
    judged_rows = [_claim(item) for item in judged if item.verdict in settled]
    beside = [_claim(i) for i in judged if i.ours is not None and i.verdict not in settled]
    if judged_rows:
        parts.append(f"### Judged\n\n{table(CLAIM_HEAD, judged_rows)}")
    if beside:
        title = f"Not judged, with a number of ours beside ({len(beside)} claims)"
        parts.append(Folded(title=title, markdown=table(CLAIM_HEAD, beside)))
    whole = verdict.to_markdown(judged, load_findings(), load_properties())
    parts.append("### Every claim, by source")
    for chunk in whole.split("\n## ")[1:]:
        name, _, text = chunk.partition("\n")
        parts.append(Folded(title=name, markdown=text.strip()))
    return Section(id="claims", title="Claims against measurements", parts=parts)


def _claim(item: Judged) -> tuple[str, ...]:
    claim, ours = item.claim, "" if item.ours is None else f"{round(item.ours, 4):.4g}"
    if item.low is not None and item.high is not None:
        ours += f" [{round(item.low, 4):.3g}, {round(item.high, 4):.3g}]"
    return (
        f"{claim.source}: {claim.system}",
        claim.task,
        claim.metric,
        f"{claim.value:g} {claim.unit}",
        ours,
        f"{item.weights}, {item.label}, n={item.n}",
        item.verdict,
        item.reason,
    )


CLAIM_HEAD = ("claim", "task", "metric", "claimed", "ours", "ours is", "verdict", "why")
MEANINGS = {
    "reproduced": "same weights and setting, ours within the tolerance",
    "off": "same weights and setting, ours outside the tolerance",
    "predicted": "T/NFE as claimed, step times ours: not a measured speedup",
    "flagged": "same weights and setting, but a validity flag spoils ours: shown, not judged",
    "different weights": "the same method and quantity on other weights: shown beside, not judged",
    "different setting": "the same weights, but other problems, length or hardware: not judged",
    "not run": "nothing of ours; the table says what it would take",
}
