"""The tasks by name. Building one reads its data; lm-eval is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.tasks.chat import ChatTokenizer
    from bench.tasks.task import Task

TASKS: tuple[str, ...] = (
    "humaneval", "mbpp", "mbpp_plus", "gsm8k_cot", "gsm8k_chain",
    "own_code", "own_math", "own_templates",
)  # fmt: skip


def load_task(
    name: str,
    *,
    data_dir: Path | None = None,
    style: str = "base",
    tokenizer: ChatTokenizer | None = None,
) -> Task:
    """The task called `name`, its data found and checked.

    style "base" gives the library's own prompt; "chat" our instruction through tokenizer.chat.
    UserError: unknown name or style, no data anywhere, wrong checksum, malformed file.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: known tasks are {', '.join(TASKS)}")
    from bench.tasks.chains import Gsm8kChain
    from bench.tasks.gsm8k import Gsm8kCot
    from bench.tasks.humaneval import HumanEval
    from bench.tasks.mbpp import Mbpp, MbppPlus
    from bench.tasks.own_problems import OwnCode, OwnMath
    from bench.tasks.templates import OwnTemplates

    kinds = (
        HumanEval, Mbpp, MbppPlus, Gsm8kCot, Gsm8kChain, OwnCode, OwnMath, OwnTemplates
    )  # fmt: skip
    chosen = {kind.name: kind for kind in kinds}[name]
    return chosen(data_dir=data_dir, style=style, tokenizer=tokenizer)
