"""Which outcomes of a verification are drafted, and which block serves one that was not.

Dense TiDAR drafts a block of K masks for each of the K outcomes (section 3.2). A subset S costs
K + K|S| query tokens instead of K(K+1). The rules, as integers without torch (`bench.autotune`
predicts with them, `tidar_ref.tidar` decodes with them):

- Short drafts. A draft of L <= K tokens ends with outcome L at the latest, so its step drafts the
  outcomes `layout(S, L)`: S pressed below L, distinct while there is room. Outcome L is always one.
- Fallback. If the true outcome r was not drafted, the block of the largest drafted j < r covers
  positions P+j .. P+j+K-1; its slots behind P+r, guessed without seeing d_j .. d_(r-1), are the
  rest of a draft of K-(r-j) tokens. If no smaller outcome was drafted, the next draft is v_r alone.

Either way the next draft starts with v_r, so that beta = 1 stays greedy AR, token for token.
"""

from __future__ import annotations

from tidar_ref.errors import UserError


def parse_outcomes(value: str | int, block_len: int) -> tuple[int, ...]:
    """`"1-4-8"` (or 4) to (1, 4, 8); UserError unless rising whole numbers in 1..K."""
    words = str(value).split("-")
    outcomes = tuple(int(word) for word in words if word.isascii() and word.isdigit())
    rising = all(low < high for low, high in zip(outcomes, outcomes[1:], strict=False))
    inside = bool(outcomes) and 1 <= outcomes[0] and outcomes[-1] <= block_len
    if len(outcomes) != len(words) or not rising or not inside:
        raise UserError(
            f"outcomes is {value!r}: give rising whole numbers from 1 to block_len = {block_len}"
            " with dashes between, such as 1-4"
        )
    return outcomes


def layout(outcomes: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The outcomes drafted beside a draft of `length` tokens, as many as there are in `outcomes`.

    A whole draft (length K) gives `outcomes` itself; a draft shorter than their number, repeats.
    """
    last = len(outcomes) - 1
    return tuple(max(1, min(j, length - (last - i))) for i, j in enumerate(outcomes))


def next_draft(drafted: tuple[int, ...], r: int, block_len: int) -> tuple[int, int]:
    """(index of the block in `drafted`, length of the next draft) after outcome r.

    Length 1 means that only v_r is known; the index then stands for nothing.
    """
    index = max((i for i, j in enumerate(drafted) if j <= r), default=-1)
    return (0, 1) if index < 0 else (index, block_len - (r - drafted[index]))
