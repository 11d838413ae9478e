"""Preallocated key/value cache with one length per sequence.

Committed tokens occupy slots 0..kv_len-1. A forward writes its new tokens right behind them; what
the decoder does not commit stays there as scratch and is overwritten by the next forward. So
rejected drafts and mask tokens are dropped by not advancing `kv_len` (paper, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidar_ref.config import ModelConfig
from tidar_ref.errors import UserError


class KVCache:
    """k, v: [layers, B, Hkv, max_len + scratch, D]; kv_len: [B] (int64), mirrored in `lengths`.

    `lengths` is the host's copy of `kv_len`, so that eager decoding can slice without a device
    synchronisation. Raises UserError if the positions do not fit the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        max_len: int,
        scratch: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if max_len > config.max_position:
            raise UserError(
                f"prompt and new tokens need {max_len} positions but the model has"
                f" {config.max_position}: shorten the prompt or lower --max-new-tokens"
            )
        shape = (config.num_layers, batch, config.num_kv_heads, max_len + scratch, config.head_dim)
        # Zeros, not empty: a masked slot is multiplied by 0, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.kv_len = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = [0] * batch
        self.max_len, self.scratch = max_len, scratch

    @property
    def uniform(self) -> bool:
        """True if all sequences have the same length, so one slice serves them all."""
        return len(self.lengths) == 1 or len(set(self.lengths)) == 1

    def open(self, width: int) -> OpenSlots:
        """Make room for `width` new tokens a sequence behind the committed ones."""
        self.room_for(width)
        return OpenSlots(self, width)

    def room_for(self, width: int) -> int:
        """The first free slot of the longest sequence, if `width` more tokens fit; or UserError."""
        capacity = self.max_len + self.scratch
        if max(self.lengths) + width > capacity:
            raise UserError(
                f"{width} new tokens behind {max(self.lengths)} cached ones exceed the cache's"
                f" {capacity} slots: allocate a longer cache"
            )
        return max(self.lengths)

    def advance(self, counts: list[int]) -> None:
        """Commit the first counts[b] of the tokens just written; the rest becomes scratch again."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        if max(self.lengths) > self.max_len + self.scratch:
            raise ValueError(f"cache lengths {self.lengths} exceed {self.max_len + self.scratch}")
        self.kv_len = torch.tensor(self.lengths, dtype=torch.int64, device=self.kv_len.device)

    def keep(self, indices: Tensor, counts: list[int]) -> None:
        """Commit chosen ones of the tokens just written: of row b, indices[b, :counts[b]].

        indices [B, W] (int64) count from `kv_len`; those a row keeps are increasing. Their K/V move
        to the slots right behind the prefix, in this order (the accepted path of a tree).
        """
        layers, batch, heads, _, dim = self.k.shape
        if counts and max(counts) > indices.shape[1]:
            raise ValueError(f"counts {counts} exceed the {indices.shape[1]} indices given")

        def slots(offsets: Tensor) -> Tensor:
            at = (self.kv_len[:, None] + offsets)[None, :, None, :, None]
            return at.expand(layers, batch, heads, -1, dim)

        source = slots(indices)
        target = slots(torch.arange(indices.shape[1], device=indices.device))
        for stored in (self.k, self.v):
            stored.scatter_(3, target, stored.gather(3, source))
        self.advance(counts)


class BoundedCache(KVCache):
    """The same K/V and `kv_len`, seen by `width` new tokens through the first `bound` slots only.

    For steps whose lengths the host does not know: every shape follows from `bound`, every place
    from `kv_len` on the device. Whoever uses it sees to it that kv_len + new tokens <= bound.
    """

    uniform = False  # as far as the host may know

    def __init__(self, cache: KVCache, bound: int, width: int) -> None:
        if not width <= bound <= cache.k.shape[3]:
            raise ValueError(f"{width} new tokens, a bound of {bound}, {cache.k.shape[3]} slots")
        self.k, self.v, self.kv_len = cache.k, cache.v, cache.kv_len
        self.max_len, self.scratch = bound, 0
        self.lengths = [bound - width] * cache.kv_len.shape[0]


class OpenSlots:
    """The views one forward writes to and reads from, made once and not once a layer."""

    def __init__(self, cache: KVCache, width: int) -> None:
        end = max(cache.lengths) + width
        self.keys = cache.k[:, :, :, :end].unbind(0)
        self.values = cache.v[:, :, :, :end].unbind(0)
        self.index: Tensor | None = None  # [B, 1, Q, 1], only if lengths differ
        if cache.uniform:
            start = cache.lengths[0]
            self.new_keys = cache.k[:, :, :, start:end].unbind(0)
            self.new_values = cache.v[:, :, :, start:end].unbind(0)
        else:
            steps = torch.arange(width, device=cache.kv_len.device)
            self.index = (cache.kv_len[:, None] + steps)[:, None, :, None]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, Hkv, Q, D]; return all keys and values [B, Hkv, L, D] of the layer."""
        if self.index is None:
            self.new_keys[layer].copy_(k)
            self.new_values[layer].copy_(v)
        else:
            index = self.index.expand_as(k)
            self.keys[layer].scatter_(2, index, k)
            self.values[layer].scatter_(2, index, v)
        return self.keys[layer], self.values[layer]
