"""From documents to the rows of one training forward: ids, positions, who sees whom, labels.

A document is a prompt and a response (an empty prompt: plain text). Its clean rows are the tokens
themselves; its mask rows are blocks of K mask tokens over the response (paper, Figure 3 left).
Documents are packed without padding: all clean rows of all documents first, then all mask rows.

Visibility is three numbers a row, from which the dense mask, the Flex Attention mask and the
blocked CPU path are all made:

    allow(q, k)  <=>  document[q] == document[k] and
                      (k clean: position[k] < clean_before[q];  k mask: block[k] == block[q])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_ref.errors import UserError

IGNORE = -100
WEIGHTINGS = ("even", "arrival")
OBJECTIVES = ("tidar", "ar", "block_diffusion", "eagle3")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One document as token ids; the loss is on the response (end-of-sequence included) only.

    An empty prompt is plain text: the loss is then on every token.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.response


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is trained. The three siblings differ in this record only.

    kind: "tidar" (causal clean rows, mask blocks), "ar" (clean rows only), "block_diffusion"
    (clean rows block-causal, no next-token loss), "eagle3" (clean rows, for a draft head's
    `tidar_ref.training.eagle.HeadNetwork`). block_lens: each grid draws one of them.
    alpha: weight of the AR term (2.4). masking: "full", or "random" with a ratio drawn per block.
    random_offset: the grid starts 0..K-1 tokens into the response, else at its first token (at the
    document's first token without a prompt). grids: block grids per document, sharing its clean
    rows. weighting: "even", or "arrival": a draft counts by the probability that those between it
    and its block's first token are right, for behind a rejected draft no other is looked at (ours,
    not the paper's; the first needs not be right, for at beta = 1 that token is the AR half's; the
    mean stays over all drafts).
    """

    kind: str = "tidar"
    block_lens: tuple[int, ...] = (8,)
    alpha: float = 1.0
    masking: str = "full"
    random_offset: bool = True
    grids: int = 1
    weighting: str = "even"

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise UserError(f"objective {self.kind!r} is unknown: use {', '.join(OBJECTIVES)}")
        if self.masking not in ("full", "random"):
            raise UserError(f"masking is {self.masking!r}: use full or random")
        if self.weighting not in WEIGHTINGS:
            raise UserError(f"weighting is {self.weighting!r}: use {' or '.join(WEIGHTINGS)}")
        if self.weighting == "arrival" and (self.kind, self.masking) != ("tidar", "full"):
            raise UserError("arrival weights are for tidar's blocks of masks alone: use even ones")
        if self.alpha < 0:
            raise UserError(f"alpha is {self.alpha}: the weight of the AR term is at least 0")
        if not self.block_lens or min(self.block_lens) < 2 or self.grids < 1:
            raise UserError(
                f"block lengths {self.block_lens} with {self.grids} grids: each block needs at"
                " least 2 tokens and each document at least 1 grid"
            )
        if self.kind == "block_diffusion" and len(self.block_lens) > 1:
            raise UserError("block diffusion trains one block length: its clean rows depend on it")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One packed forward of N rows, the first `clean` of them clean. All tensors are [N], int64.

    labels: the token each row must predict (clean: the next one; mask: its own), or -100.
    weights [N] float32: loss weight of the row (1, or 1/t under random masking).
    is_mask: True where the row's input is the mask token (with random masking a row of the mask
    part may hold its real token). documents: (clean slice, mask slice) of each, row indices.
    """

    ids: Tensor
    positions: Tensor
    document: Tensor
    block: Tensor
    clean_before: Tensor
    labels: Tensor
    weights: Tensor
    is_mask: Tensor
    clean: int
    documents: tuple[tuple[slice, slice], ...]

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> Rows:
        """The same rows with their tensors on `device`."""
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Rows(**moved)


def build_rows(
    examples: Sequence[Example], objective: Objective, *, mask_token_id: int, seeds: Sequence[int]
) -> Rows:
    """Pack the documents; offsets, block lengths and mask ratios of each come from its own seed.

    So a document's rows do not depend on what it is packed with, nor on the rank that packs it.
    """
    clean, masks = _Columns(), _Columns()
    spans: list[tuple[slice, slice]] = []
    blocks = 0
    for index, (example, seed) in enumerate(zip(examples, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        tokens, first = example.tokens, len(example.prompt)
        if len(tokens) < 2 or not example.response:
            raise UserError(f"training document {index} has no token to predict: drop it")
        before = (clean.count, masks.count)
        grids = 0 if objective.kind in ("ar", "eagle3") else objective.grids
        starts = [_draw_grid(objective, generator, first) for _ in range(grids)]
        _add_clean(clean, tokens, first, index, objective, starts)
        for length, start in starts:
            blocks = _add_grid(
                masks, tokens, (length, start), index, blocks, objective, mask_token_id, generator
            )
        spans.append((slice(before[0], clean.count), slice(before[1], masks.count)))
    n = clean.count
    return Rows(
        **clean.joined(masks),
        clean=n,
        documents=tuple((c, slice(m.start + n, m.stop + n)) for c, m in spans),
    )


def visible(rows: Rows) -> Tensor:
    """Dense [N, N] visibility, True where the row may attend to the column."""
    same = rows.document[:, None] == rows.document[None, :]
    is_clean = (rows.block < 0)[None, :]
    to_clean = is_clean & (rows.positions[None, :] < rows.clean_before[:, None])
    to_block = ~is_clean & (rows.block[None, :] == rows.block[:, None])
    return same & (to_clean | to_block)


class _Columns:
    """Growing lists, one per field of Rows."""

    NAMES = ("ids", "positions", "document", "block", "clean_before", "labels", "is_mask")

    def __init__(self) -> None:
        self.lists: dict[str, list[int]] = {name: [] for name in self.NAMES}
        self.weights: list[float] = []

    @property
    def count(self) -> int:
        return len(self.weights)

    def add(self, weight: float = 1.0, **values: int) -> None:
        for name in self.NAMES:
            self.lists[name].append(values[name])
        self.weights.append(weight)

    def joined(self, other: _Columns) -> dict[str, Tensor]:
        columns = {
            name: torch.tensor(self.lists[name] + other.lists[name], dtype=torch.int64)
            for name in self.NAMES
        }
        columns["is_mask"] = columns["is_mask"].bool()
        columns["weights"] = torch.tensor(self.weights + other.weights, dtype=torch.float32)
        return columns


def _draw_grid(objective: Objective, generator: torch.Generator, first: int) -> tuple[int, int]:
    """(block length, position of the first block) of one grid."""
    choice = int(torch.randint(len(objective.block_lens), (1,), generator=generator))
    length = objective.block_lens[choice]
    offset = int(torch.randint(length, (1,), generator=generator)) if objective.random_offset else 0
    return length, first + offset


def _add_clean(
    columns: _Columns,
    tokens: tuple[int, ...],
    first: int,
    document: int,
    objective: Objective,
    grids: list[tuple[int, int]],
) -> None:
    for position, token in enumerate(tokens):
        following = position + 1
        wanted = max(first, 1) <= following < len(tokens) and objective.kind != "block_diffusion"
        before = following
        if objective.kind == "block_diffusion":  # a clean row sees its whole block
            length, start = grids[0]
            if position >= start:
                before = min(start + ((position - start) // length + 1) * length, len(tokens))
            elif position >= first:  # what lies between prompt and first block is one short block
                before = min(start, len(tokens))
        columns.add(
            ids=token,
            positions=position,
            document=document,
            block=-1,
            clean_before=before,
            labels=tokens[following] if wanted else IGNORE,
            is_mask=0,
        )


def _add_grid(
    columns: _Columns,
    tokens: tuple[int, ...],
    grid: tuple[int, int],
    document: int,
    blocks: int,
    objective: Objective,
    mask_token_id: int,
    generator: torch.Generator,
) -> int:
    """Blocks of K rows from the grid's start on; the last one is padded, its padding has no loss.

    Every block has exactly K rows, as at inference. Gives the next free block number.
    """
    length, start = grid
    for begin in range(start, len(tokens), length):
        random = objective.masking == "random" or objective.kind == "block_diffusion"
        ratio = float(torch.rand(1, generator=generator)) if random else 1.0
        ratio = max(ratio, 1.0 / length)  # a block with (almost surely) no mask teaches nothing
        hidden = torch.rand(length, generator=generator) < ratio if random else None
        for slot in range(length):
            position = begin + slot
            inside = position < len(tokens)
            masked = hidden is None or bool(hidden[slot]) or not inside
            columns.add(
                ids=mask_token_id if masked else tokens[position],
                positions=position,
                document=document,
                block=blocks,
                clean_before=begin,
                labels=tokens[position] if masked and inside else IGNORE,
                is_mask=int(masked),
                weight=1.0 / ratio,
            )
        blocks += 1
    return blocks
