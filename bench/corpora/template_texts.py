"""The stories that templates.py fills in: wordings, the numbers they draw, and their steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Template:
    """One kind of problem. numbers: letter to a key of RANGES; steps: see templates.worked.

    All wordings ask the same question of the same numbers, in the order of the steps or not.
    """

    name: str
    numbers: dict[str, str]
    steps: tuple[str, ...]
    texts: tuple[str, ...]


# Both ends included. A total is what a division starts from.
RANGES: dict[str, tuple[int, int]] = {
    "digit": (2, 9),
    "dozen": (2, 12),
    "few": (2, 20),
    "some": (5, 50),
    "many": (20, 99),
    "total": (6, 108),
}

NAMES: tuple[tuple[str, str], ...] = (
    ("Anna", "she"), ("Ben", "he"), ("Carla", "she"), ("David", "he"), ("Emma", "she"),
    ("Frank", "he"), ("Grace", "she"), ("Henry", "he"), ("Ivy", "she"), ("Jack", "he"),
    ("Kate", "she"), ("Leo", "he"), ("Maria", "she"), ("Nick", "he"), ("Olga", "she"),
    ("Paul", "he"), ("Rosa", "she"), ("Sam", "he"), ("Tina", "she"), ("Victor", "he"),
)  # fmt: skip

THINGS: tuple[tuple[str, str], ...] = (
    ("apple", "apples"), ("bead", "beads"), ("book", "books"), ("button", "buttons"),
    ("card", "cards"), ("coin", "coins"), ("cookie", "cookies"), ("flower", "flowers"),
    ("lemon", "lemons"), ("marble", "marbles"), ("pear", "pears"), ("pencil", "pencils"),
    ("photo", "photos"), ("shell", "shells"), ("stamp", "stamps"), ("sticker", "stickers"),
)  # fmt: skip

TEMPLATES: tuple[Template, ...] = (
    # One step.
    Template(
        name="more",
        numbers={"a": "some", "b": "some"},
        steps=("a+b",),
        texts=(
            "{name} has {a} {things} and gets {b} more. How many {things} does {who} have now?",
            "There are {a} {things} on the table. {name} puts {b} more there. "
            "How many {things} are on the table?",
            "{name} finds {a} {things} and {other} finds {b}. "
            "How many {things} do they find together?",
        ),
    ),
    Template(
        name="fewer",
        numbers={"a": "many", "b": "some"},
        steps=("a-b",),
        texts=(
            "{name} has {a} {things} and gives {b} of them away. "
            "How many {things} does {who} keep?",
            "A shop has {a} {things}. In the morning it sells {b}. How many {things} remain?",
            "{name} had {a} {things} but lost {b}. How many {things} are left?",
        ),
    ),
    Template(
        name="compare",
        numbers={"a": "many", "b": "some"},
        steps=("a-b",),
        texts=(
            "{name} has {a} {things}. {other} has {b}. "
            "How many more {things} does {name} have than {other}?",
            "{other} owns {b} {things} and {name} owns {a}. "
            "By how many {things} is {name} ahead?",
        ),
    ),
    Template(
        name="boxes",
        numbers={"a": "dozen", "b": "digit"},
        steps=("a*b",),
        texts=(
            "{name} fills {a} boxes with {b} {things} each. How many {things} is that?",
            "There are {b} {things} in every bag. How many {things} are in {a} bags?",
            "On {a} days {name} sells {b} {things} a day. How many {things} does {who} sell?",
        ),
    ),
    Template(
        name="price",
        numbers={"a": "dozen", "b": "digit"},
        steps=("a*b",),
        texts=(
            "One {thing} costs {b} dollars. How many dollars do {a} {things} cost?",
            "{name} buys {a} {things} at {b} dollars each. How many dollars does {who} pay?",
        ),
    ),
    Template(
        name="share",
        numbers={"a": "total", "b": "digit"},
        steps=("a/b",),
        texts=(
            "{name} shares {a} {things} equally among {b} children. "
            "How many {things} does each child get?",
            "{a} {things} are laid in {b} equal rows. How many {things} are in one row?",
        ),
    ),
    Template(
        name="packs",
        numbers={"a": "total", "b": "digit"},
        steps=("a/b",),
        texts=(
            "{name} packs {a} {things} into bags of {b}. How many bags does {who} fill?",
            "Each page holds {b} {things}. How many pages does {name} need for {a} {things}?",
            "{name} needs {a} {things} and gets {b} per day. How many days does that take?",
        ),
    ),
    Template(
        name="times",
        numbers={"a": "dozen", "b": "digit"},
        steps=("a*b",),
        texts=(
            "{name} has {a} {things}. {other} has {b} times as many. "
            "How many {things} does {other} have?",
            "{other} has {b} times as many {things} as {name}, who has {a}. "
            "How many does {other} have?",
        ),
    ),
    # Two steps.
    Template(
        name="boxes_fewer",
        numbers={"a": "dozen", "b": "digit", "c": "some"},
        steps=("a*b", "r1-c"),
        texts=(
            "{name} buys {a} boxes of {b} {things} and gives away {c} {things}. "
            "How many {things} does {who} have left?",
            "There are {a} bags with {b} {things} in each. {name} takes out {c} {things}. "
            "How many stay in the bags?",
        ),
    ),
    Template(
        name="boxes_more",
        numbers={"a": "dozen", "b": "digit", "c": "some"},
        steps=("a*b", "r1+c"),
        texts=(
            "{name} has {a} boxes of {b} {things} and {c} loose {things}. "
            "How many {things} does {who} have?",
            "{name} makes {b} {things} a day for {a} days. {Who} already had {c}. "
            "How many {things} are there now?",
        ),
    ),
    Template(
        name="more_fewer",
        numbers={"a": "some", "b": "some", "c": "some"},
        steps=("a+b", "r1-c"),
        texts=(
            "{name} has {a} {things}, gets {b} from {other} and loses {c}. "
            "How many {things} does {who} have now?",
            "A bus carries {a} people. At a stop {b} get on and then {c} get off. "
            "How many people are on the bus?",
        ),
    ),
    Template(
        name="fewer_more",
        numbers={"a": "many", "b": "some", "c": "some"},
        steps=("a-b", "r1+c"),
        texts=(
            "{name} had {a} {things}, sold {b} of them and then bought {c}. "
            "How many {things} does {who} have?",
            "A tank holds {a} litres of water. {name} lets out {b} litres and pours in {c}. "
            "How many litres are inside?",
        ),
    ),
    Template(
        name="fewer_fewer",
        numbers={"a": "many", "b": "some", "c": "few"},
        steps=("a-b", "r1-c"),
        texts=(
            "{name} has {a} dollars. {Who} spends {b} on shoes and {c} on lunch. "
            "How many dollars are left?",
            "Of {a} {things}, {name} loses {b} and {other} takes {c}. "
            "How many {things} remain?",
        ),
    ),
    Template(
        name="join_share",
        numbers={"a": "some", "b": "some", "c": "digit"},
        steps=("a+b", "r1/c"),
        texts=(
            "{name} has {a} {things} and {other} has {b}. They put them together in {c} equal "
            "piles. How many {things} are in a pile?",
            "{a} boys and {b} girls form {c} teams of the same size. "
            "How many children are in a team?",
        ),
    ),
    Template(
        name="fewer_share",
        numbers={"a": "many", "b": "some", "c": "digit"},
        steps=("a-b", "r1/c"),
        texts=(
            "{name} has {a} {things} and keeps {b}. {Who} splits the rest evenly among {c} "
            "friends. How many {things} does each friend get?",
            "A book has {a} pages. {name} has read {b} and reads {c} pages a day now. "
            "How many more days does {who} need?",
        ),
    ),
    Template(
        name="share_fewer",
        numbers={"a": "total", "b": "digit", "c": "digit"},
        steps=("a/b", "r1-c"),
        texts=(
            "{b} children share {a} {things} equally. {name}, one of them, loses {c}. "
            "How many {things} does {who} have left?",
            "{name} packs {a} {things} into bags of {b} and sells {c} bags. "
            "How many full bags are left?",
        ),
    ),
    Template(
        name="share_more",
        numbers={"a": "total", "b": "digit", "c": "some"},
        steps=("a/b", "r1+c"),
        texts=(
            "{a} {things} are shared by {b} children. {name} gets one share and has {c} already. "
            "How many {things} does {who} have now?",
            "{name} earns {a} dollars in {b} days, the same each day. With one day's pay and {c} "
            "dollars of savings, how many dollars does {who} have?",
        ),
    ),
    Template(
        name="times_together",
        numbers={"a": "dozen", "b": "digit"},
        steps=("a*b", "r1+a"),
        texts=(
            "{name} has {a} {things}. {other} has {b} times as many. "
            "How many {things} do they have together?",
            "{name} reads {a} pages on Monday and {b} times as many on Tuesday. "
            "How many pages is that in both days?",
        ),
    ),
    Template(
        name="three_parts",
        numbers={"a": "few", "b": "some", "c": "some"},
        steps=("a+b", "r1+c"),
        texts=(
            "{name} picks {a} {things} on Monday, {b} on Tuesday and {c} on Friday. "
            "How many {things} does {who} pick in all?",
            "A farm has {a} horses, {b} cows and {c} sheep. How many animals are there?",
        ),
    ),
    Template(
        name="change",
        numbers={"a": "dozen", "b": "digit", "c": "many"},
        steps=("a*b", "c-r1"),
        texts=(
            "{name} has {c} dollars and buys {a} {things} for {b} dollars each. "
            "How many dollars does {who} have left?",
            "{name} wants to run {c} km. {Who} runs {b} km on each of {a} days. "
            "How many km are missing?",
        ),
    ),
    Template(
        name="unit_price",
        numbers={"a": "total", "b": "digit", "c": "digit"},
        steps=("a/b", "r1*c"),
        texts=(
            "{b} {things} cost {a} dollars. How many dollars do {c} {things} cost?",
            "A machine makes {a} {things} in {b} hours. How many {things} does it make in {c} "
            "hours?",
        ),
    ),
    Template(
        name="ages",
        numbers={"a": "dozen", "b": "some", "c": "few"},
        steps=("a+b", "r1-c"),
        texts=(
            "{name} is {a} years old. {Whose} uncle is {b} years older. "
            "How old was the uncle {c} years ago?",
            "{other} is {b} years older than {name}, who is {a}. "
            "How old was {other} {c} years ago?",
        ),
    ),
    # Three steps.
    Template(
        name="two_kinds",
        numbers={"a": "dozen", "b": "digit", "c": "digit", "d": "digit"},
        steps=("a*b", "c*d", "r1+r2"),
        texts=(
            "{name} buys {a} {things} for {b} dollars each and {c} cups for {d} dollars each. "
            "How much does {who} pay?",
            "{a} bags hold {b} {things} each, and {c} boxes hold {d} each. "
            "How many {things} are there?",
        ),
    ),
    Template(
        name="two_workers",
        numbers={"a": "dozen", "b": "digit", "c": "digit", "d": "digit"},
        steps=("a*b", "c*d", "r1-r2"),
        texts=(
            "{name} makes {b} {things} a day for {a} days. {other} makes {d} a day for {c} days. "
            "How many more does {name} make?",
            "{name} fills {a} bags with {b} {things} each. {other} takes {c} packs of {d} out. "
            "How many {things} remain?",
        ),
    ),
    Template(
        name="boxes_more_fewer",
        numbers={"a": "dozen", "b": "digit", "c": "few", "d": "some"},
        steps=("a*b", "r1+c", "r2-d"),
        texts=(
            "{name} has {a} boxes of {b} {things} and finds {c} more. {Who} sells {d}. "
            "How many {things} does {who} have left?",
            "{name} works {a} days for {b} dollars a day, gets a gift of {c} dollars and spends "
            "{d}. How many dollars are left?",
        ),
    ),
    Template(
        name="join_fewer_share",
        numbers={"a": "some", "b": "some", "c": "few", "d": "digit"},
        steps=("a+b", "r1-c", "r2/d"),
        texts=(
            "{name} has {a} {things} and gets {b}. {Who} loses {c} and shares the rest among {d} "
            "friends. How many does each get?",
            "A baker makes {a} rolls and {b} buns. {c} pieces burn. The others go into bags of "
            "{d}. How many bags is that?",
        ),
    ),
    Template(
        name="half",
        numbers={"a": "few", "b": "few"},
        steps=("a/2", "a+r1", "r2-b"),
        texts=(
            "{name} makes {a} {things} in May and half as many in June. {Who} gives {b} away. "
            "How many {things} are left?",
            "{name} walks {a} km, and {other} half as far. {b} km of all that were in the rain. "
            "How many km were dry?",
        ),
    ),
    Template(
        name="fewer_times_more",
        numbers={"a": "few", "b": "few", "c": "digit", "d": "few"},
        steps=("a-b", "r1*c", "r2+d"),
        texts=(
            "{name} makes {a} {things} and keeps {b}. {Who} sells the rest for {c} dollars each. "
            "{Who} had {d} dollars. How many dollars does {who} have now?",
            "Of {a} tables {b} are broken. Every good one has {c} chairs, and {d} chairs stand "
            "apart. How many chairs are in use or apart?",
        ),
    ),
    Template(
        name="two_days_change",
        numbers={"a": "digit", "b": "digit", "c": "digit", "d": "many"},
        steps=("a+b", "r1*c", "d-r2"),
        texts=(
            "{name} buys {a} {things} today and {b} tomorrow, at {c} dollars each. {Who} has {d} "
            "dollars. How many are left?",
            "{name} reads {a} pages each morning and {b} each evening for {c} days. The book has "
            "{d} pages. How many are left?",
        ),
    ),
    Template(
        name="share_fewer_price",
        numbers={"a": "total", "b": "digit", "c": "digit", "d": "digit"},
        steps=("a/b", "r1-c", "r2*d"),
        texts=(
            "{name} packs {a} {things} into boxes of {b} and keeps {c} boxes. {Who} sells the "
            "others for {d} dollars each. How many dollars is that?",
            "{a} children stand in rows of {b}. {c} rows go home. In each other row {name} counts "
            "{d} hats. How many hats does {who} count?",
        ),
    ),
)
