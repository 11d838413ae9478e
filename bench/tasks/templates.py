"""Held-out word problems of our own templates: needs no data, and a 135M model can learn them.

Only (template, numbers) combinations that no training example can have (bench/corpora/templates),
each once. The stories are those of the training examples: the score tells whether a model reads
and computes with new numbers, not whether it understands new stories.
"""

from __future__ import annotations

import hashlib
import json
from decimal import Decimal
from pathlib import Path

from bench.corpora.templates import draw
from bench.tasks.chains import Asked, ChainTask
from bench.tasks.task import DataSource

COUNT = 200
SEED = 0


class OwnTemplates(ChainTask):
    """200 problems by default, the same on every machine."""

    name = "own_templates"

    def ask(self, data_dir: Path | None) -> dict[str, Asked]:
        del data_dir  # made here
        rows: dict[str, Asked] = {}
        seen: set[tuple[str, tuple[int, ...]]] = set()
        index = 0
        while len(rows) < COUNT:
            drawn = draw(index, seed=SEED, split="heldout")
            if (drawn.template, drawn.numbers) not in seen:
                seen.add((drawn.template, drawn.numbers))
                id = f"{self.name}/{len(rows)}"
                rows[id] = Asked(prompt=drawn.prompt, answer=Decimal(drawn.answer))
            index += 1
        text = json.dumps([[row.prompt, str(row.answer)] for row in rows.values()])
        self.source = DataSource(
            kind="own",
            path=f"bench/corpora/templates.py: heldout, seed {SEED}, {COUNT} problems",
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            checked=False,
        )
        return rows
