"""Attention masks and positions, cell by cell against the rules and against the paper's figures."""

from __future__ import annotations

import oracles
import pytest
import torch

from tidar_ref import masks

BLOCKS = range(2, 17)

# Figure 3 (right), K=3: rows and columns are d0 d1 d2, block 1, block 2, block 3.
FIGURE_3 = """
    #.. ... ... ...
    ##. ... ... ...
    ### ... ... ...
    #.. ### ... ...
    #.. ### ... ...
    #.. ### ... ...
    ##. ... ### ...
    ##. ... ### ...
    ##. ... ### ...
    ### ... ... ###
    ### ... ... ###
    ### ... ... ###
"""

# Figure 7 with a prompt of 4 and K=3, our order (prompt, masks).
FIGURE_7 = """
    #... ...
    ##.. ...
    ###. ...
    #### ...
    #### ###
    #### ###
    #### ###
"""


def parse(picture: str) -> torch.Tensor:
    lines = [line.replace(" ", "") for line in picture.split("\n") if line.strip()]
    return torch.tensor([[cell == "#" for cell in line] for line in lines])


@pytest.mark.parametrize("block_len", BLOCKS)
def test_decode_mask_every_cell(block_len: int) -> None:
    rows = oracles.decode_rows(0, block_len)
    mask = masks.decode_mask(block_len)
    assert mask.dtype == torch.bool and mask.shape == (len(rows), len(rows))
    for i, query in enumerate(rows):
        expected = [oracles.may_attend(query, key) for key in rows]
        assert mask[i].tolist() == expected, f"row {query}"


@pytest.mark.parametrize("block_len", BLOCKS)
def test_decode_positions_every_row(block_len: int) -> None:
    prefix = 7
    rows = oracles.decode_rows(0, block_len)
    offsets = masks.decode_positions(block_len)
    assert offsets.dtype == torch.long
    assert (offsets + prefix).tolist() == [oracles.row_position(row, prefix) for row in rows]


def test_decode_matches_figure_3() -> None:
    assert torch.equal(masks.decode_mask(3), parse(FIGURE_3))
    positions = (masks.decode_positions(3) + 3).tolist()
    assert positions == [3, 4, 5, 4, 5, 6, 5, 6, 7, 6, 7, 8]


def test_prefill_matches_figure_7() -> None:
    assert torch.equal(masks.prefill_mask(4, 3), parse(FIGURE_7))
    assert masks.prefill_positions(4, 3).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("block_len", BLOCKS)
@pytest.mark.parametrize("prompt_len", [1, 2, 5, 17])
def test_prefill_every_cell(prompt_len: int, block_len: int) -> None:
    mask = masks.prefill_mask(prompt_len, block_len)
    total = prompt_len + block_len
    assert mask.dtype == torch.bool and mask.shape == (total, total)
    for query in range(total):
        for key in range(total):
            if query < prompt_len:  # prompt: causal, never a mask
                expected = key <= query
            else:  # mask: the whole prompt and every mask
                expected = True
            assert bool(mask[query, key]) is expected, (query, key)
    assert masks.prefill_positions(prompt_len, block_len).tolist() == list(range(total))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_mask(length: int) -> None:
    assert torch.equal(masks.causal_mask(length), oracles.causal(length))


@pytest.mark.parametrize("block_len", BLOCKS)
def test_oracle_obeys_the_structure_of_the_paper(block_len: int) -> None:
    """The oracle itself: counts and symmetries that the paper's text states."""
    rows = oracles.decode_rows(0, block_len)
    cells = torch.tensor([[oracles.may_attend(q, k) for k in rows] for q in rows])
    drafts, blocks = cells[:block_len], cells[block_len:].unflatten(0, (block_len, block_len))
    assert drafts[:, block_len:].sum() == 0  # drafts never see a mask
    assert drafts.sum() == block_len * (block_len + 1) // 2
    for j in range(
        1, block_len + 1
    ):  # all slots of a block see the same j drafts and their own block
        assert (blocks[j - 1] == blocks[j - 1][0]).all()
        assert blocks[j - 1][0, :block_len].sum() == j
        assert blocks[j - 1][0, block_len:].sum() == block_len
