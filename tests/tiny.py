"""Tiny models and prompts for the decoder tests: random, and one with often right drafts."""

from __future__ import annotations

from functools import cache

import oracles
import torch
from torch import Tensor

from tidar_ref.config import ModelConfig
from tidar_ref.model import Transformer

MASK = 15  # mask token of the 16-token vocabularies
FAMILIES = ("llama", "qwen2", "qwen3")


def model_of(
    config: ModelConfig, state: oracles.State, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The backbone under test with the oracle's weights."""
    model = Transformer(config, dtype=dtype)
    model.load_state_dict(dict(state), strict=True)
    return model.eval()


class Tiny:
    """Weights in the oracle's form and the backbone under test holding the same weights."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state
        self.model = model_of(config, state)

        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The dumb oracle's greedy continuation; the longest one asked for so far is remembered."""
        known = self._greedy.setdefault(tuple(prompt), [])
        missing = count - len(known)
        if missing > 0:
            known += oracles.greedy(self.state, self.config, [*prompt, *known], missing)
        return known[:count]


@cache
def random_tiny(family: str, seed: int = 0) -> Tiny:
    config = oracles.tiny_config(family, vocab=16, scaled=family == "llama")
    return Tiny(config, oracles.random_state(config, seed))


@cache
def trained_tiny() -> Tiny:
    """Learned to continue sequences of period 1 and 2: drafts are right, partly right and wrong."""
    config = oracles.tiny_config("qwen3", vocab=16)
    return Tiny(config, oracles.trained_state(config, mask_id=MASK))


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Prompts of 1..longest tokens: constant, alternating and random ones in turn."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        noise = torch.randint(0, MASK, (longest,), generator=generator)
        period = (1, 2, longest)[index % 3]
        out.append(noise[torch.arange(length) % period].tolist())
    return out
