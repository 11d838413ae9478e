"""Draft heads: what a recipe with a `head` trains, and the folder it leaves (bench/train.py)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.recipes import Recipe
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from tidar_ref.checkpoint import LoadedModel
    from tidar_ref.training.eagle import HeadNetwork
    from tidar_ref.training.rows import Example

def network(recipe: Recipe, loaded: LoadedModel, examples: Sequence[Example]) -> HeadNetwork:
    """A new head for these weights, over the tokens the documents answer with."""
    import torch

    from baselines._eagle3_head import head_to_train
    from tidar_ref.training.eagle import EagleConfig, HeadNetwork
    from tidar_ref.training.trainer import ranked

    if ranked():
        raise UserError(f"recipe {recipe.name} trains a head, on one rank only: leave out torchrun")
    if loaded.model.mask_adapter is not None:
        raise UserError(
            f"{loaded.source.name} has an adapter that acts on mask tokens: train the head on the"
            " base, which it verifies with"
        )
    settings = dict(recipe.head or {})
    size = min(settings.pop("draft_vocab"), loaded.model.config.vocab_size - 1)
    mask = loaded.source.mask_token_id
    ids = draft_vocabulary([e.response for e in examples], size, never=mask)
    head = head_to_train(loaded.model, torch.tensor(ids))
    return HeadNetwork(head, loaded.model, EagleConfig(**settings), mask_token_id=mask)


def draft_vocabulary(answers: Sequence[Sequence[int]], size: int, *, never: int) -> list[int]:
    """The `size` most frequent tokens of the answers, ascending; `never` is not among them.

    Where the answers hold fewer, the lowest ids join: byte-pair vocabularies are ordered by use.
    """
    counts = Counter(token for answer in answers for token in answer)
    del counts[never]
    ids = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    used = set(ids[:size])
    candidate = 0
    while len(used) < size:
        if candidate != never:
            used.add(candidate)
        candidate += 1
    return sorted(used)


def save(network: HeadNetwork, folder: Path, notes: Mapping[str, Any]) -> None:
    """The head as SpecForge writes it, in bfloat16, and what made it."""
    import torch

    from baselines._eagle3_files import NOTES_FILE, save_head

    save_head(network.head, folder, dtype=torch.bfloat16)
    own = {"draft_vocab": len(network.head.target_ids), "taps": network.head.config.taps, **notes}
    (folder / NOTES_FILE).write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
