"""Word problems of our own, without end: templates with drawn numbers, answers as chains.

An example is a pure function of (seed, split, index). Numbers are small non-negative integers
whose every step a 135M model can learn: sums and differences within LARGEST, products and exact
divisions from the table up to 12 x 9. The chain is computed, never written.

The split is made by hashing (template, numbers): one in HELD_OUT goes to "heldout", the others to
"train", whatever the names and the wording. A held-out problem is thus a known kind of story with
numbers never seen in it: the score tells arithmetic and reading, not transfer to new kinds.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bench.corpora.pairs import Pair
from bench.corpora.template_texts import NAMES, RANGES, TEMPLATES, THINGS, Template
from tidar_ref.errors import UserError

SOURCE = "own-templates"
SPLITS = ("train", "heldout")
HELD_OUT = 10
LARGEST = 120
TABLE_LONG, TABLE_SHORT = 12, 9
TRIES = 100_000  # a draw succeeds within a few hundred; beyond that the template is broken

STEP = re.compile(r"([a-z]\w*|[0-9]+)([-+*/])([a-z]\w*|[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A problem before it is a pair: which template, with which numbers, in which words."""

    template: str
    numbers: tuple[int, ...]
    prompt: str
    response: str
    answer: int


def template_pairs(count: int, *, seed: int, split: str = "train") -> list[Pair]:
    """The first `count` examples of this seed; a longer list begins with the shorter one.

    Prompt: the problem and a newline; response: "<<7*6=42>><<42-5=37>>#### 37".
    UserError: negative count or unknown split.
    """
    if count < 0:
        raise UserError(f"count {count} of template problems must be 0 or more")
    pairs = []
    for index in range(count):
        drawn = draw(index, seed=seed, split=split)
        id = f"{SOURCE}/{split}/{seed}/{index}"
        pairs.append(Pair(source=SOURCE, id=id, prompt=drawn.prompt, response=drawn.response))
    return pairs


def draw(index: int, *, seed: int, split: str = "train") -> Drawn:
    """Example `index` of this seed and split. UserError: unknown split."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {SOURCE}: use {' or '.join(SPLITS)}")
    rng = random.Random(f"{SOURCE}/{split}/{seed}/{index}")
    template = rng.choice(TEMPLATES)
    for _ in range(TRIES):
        numbers = {
            letter: rng.randint(*RANGES[kind]) for letter, kind in template.numbers.items()
        }
        steps = worked(template, numbers)
        if steps is not None and split_of(template.name, tuple(numbers.values())) == split:
            break
    else:
        raise RuntimeError(f"template {template.name!r} has no numbers for split {split!r}")
    answer = steps[-1][1]
    chain = "".join(f"<<{expression}={result}>>" for expression, result in steps)
    return Drawn(
        template=template.name,
        numbers=tuple(numbers.values()),
        prompt=_worded(template, numbers, rng) + "\n",
        response=f"{chain}#### {answer}",
        answer=answer,
    )


def split_of(template: str, numbers: tuple[int, ...]) -> str:
    """Which split (template, numbers) belongs to, for every seed and wording."""
    digest = hashlib.sha256(f"{template}:{','.join(map(str, numbers))}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELD_OUT == 0 else "train"


def worked(template: Template, numbers: Mapping[str, int]) -> list[tuple[str, int]] | None:
    """(expression, result) of each step, or None when a step leaves the allowed numbers.

    In a step, a letter is a drawn number, r1 the result of step 1, digits are themselves.
    """
    known = dict(numbers)
    done = []
    for place, step in enumerate(template.steps, start=1):
        found = STEP.fullmatch(step)
        if found is None:
            raise ValueError(f"template {template.name!r}: step {step!r} is not a two-term one")
        left, sign, right = found.groups()
        x, y = (int(term) if term.isdigit() else known[term] for term in (left, right))
        result = _result(x, sign, y)
        if result is None:
            return None
        known[f"r{place}"] = result
        done.append((f"{x}{sign}{y}", result))
    return done


def _result(x: int, sign: str, y: int) -> int | None:
    """x sign y if it is a step we ask for: 1 to LARGEST, products and quotients from the table."""
    if sign in "+-":
        result = x + y if sign == "+" else x - y
        return result if 1 <= result <= LARGEST else None
    if sign == "*":
        return x * y if _in_table(x, y) else None
    return x // y if y > 0 and x % y == 0 and _in_table(x // y, y) else None


def _in_table(x: int, y: int) -> bool:
    return 2 <= min(x, y) <= TABLE_SHORT and max(x, y) <= TABLE_LONG


def _worded(template: Template, numbers: Mapping[str, int], rng: random.Random) -> str:
    text = rng.choice(template.texts)
    (name, who), (other, _) = rng.sample(NAMES, 2)
    thing, things = rng.choice(THINGS)
    return text.format(
        name=name,
        other=other,
        who=who,
        Who=who.capitalize(),
        Whose="Her" if who == "she" else "His",
        thing=thing,
        things=things,
        **numbers,
    )
