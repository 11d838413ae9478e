"""Who may attend to whom among the new tokens of one forward: pure functions, paper's Figure 3.

True = the query (row) may attend to the key (column). The committed prefix is always visible to
every new token and is no part of these patterns.

One decode forward for K = 2 (d = drafted tokens, block j = proposal for "j tokens accepted"):

                d0 d1 | m10 m11 | m20 m21
            d0   x    |         |
            d1   x  x |         |
            m10  x    |  x   x  |            block 1 follows d0
            m11  x    |  x   x  |
            m20  x  x |         |  x   x     block 2 follows d0 d1
            m21  x  x |         |  x   x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def causal_mask(width: int) -> Tensor:
    """[width, width]: token i sees new tokens 0..i."""
    return torch.ones(width, width, dtype=torch.bool).tril()


def decode_mask(block_len: int) -> Tensor:
    """[K(K+1), K(K+1)] for the query order d_0..d_{K-1}, block 1, ..., block K (section 3.2).

    Drafts are causal and never see masks; block j sees d_0..d_{j-1} and all of itself.
    """
    return outcome_mask(block_len, range(1, block_len + 1))


def outcome_mask(block_len: int, outcomes: Sequence[int]) -> Tensor:
    """[K + nK, K + nK]: `decode_mask` with blocks for these n outcomes only, in this order."""
    k, width = block_len, block_len * (1 + len(outcomes))
    mask = torch.zeros(width, width, dtype=torch.bool)
    mask[:k, :k] = causal_mask(k)
    for index, j in enumerate(outcomes, start=1):
        rows = slice(index * k, (index + 1) * k)
        mask[rows, :j] = True
        mask[rows, rows] = True
    return mask


def decode_positions(block_len: int) -> Tensor:
    """[K(K+1)] positions relative to the prefix length: draft i at i, slot m of block j at j+m."""
    return outcome_positions(block_len, range(1, block_len + 1))


def outcome_positions(block_len: int, outcomes: Sequence[int]) -> Tensor:
    """[K + nK]: `decode_positions` for `outcome_mask`."""
    slots = torch.arange(block_len)
    return torch.cat([slots] + [slots + j for j in outcomes])


def prefill_mask(prompt_len: int, block_len: int) -> Tensor:
    """[P+K, P+K] for the order prompt, K masks (Appendix B, with the masks at the end).

    The prompt is causal and never sees the masks; the masks see the prompt and each other.
    """
    mask = causal_mask(prompt_len + block_len)
    mask[prompt_len:, prompt_len:] = True
    return mask


def prefill_positions(prompt_len: int, block_len: int) -> Tensor:
    """[P+K]: the prompt at 0..P-1, the masks at P..P+K-1."""
    return torch.arange(prompt_len + block_len)
