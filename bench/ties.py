"""How far apart tokens are at one place of a text, and how far rounding moves them there.

The same weights are evaluated over the text in their own dtype and in a wider one (float32 for
bfloat16, float64 for float32). At the last positions the gap between the two best tokens has an
error, the one evaluation against the other; the tolerance is twice the largest. Why: if greedy
decoding in two ways gives two tokens, one way got the sign of the true gap wrong, so the gap is no
larger than that way's error; twice, because the largest error seen at some positions in one
evaluation is not the largest there can be. torch is imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidar_ref.model import Transformer

# Positions whose gaps measure the rounding: the last ones of the text.
NOISE_POSITIONS = 128
SAFETY = 2.0
WIDER = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}


class Judge:
    """Weights in the record's dtype and in a wider one."""

    def __init__(self, model: Transformer, dtype: str) -> None:
        import copy

        import torch

        self.model, self.wider = model, WIDER[dtype]
        with torch.inference_mode(False):
            self.exact = copy.deepcopy(model).to(getattr(torch, self.wider))
        self.exact.mask_adapter = None  # acts on mask rows only, and a text has none
        for part in self.exact.modules():  # float32 copies of the fast routes are not wider
            for name in ("wide", "fast"):
                if hasattr(part, name):
                    setattr(part, name, None)

    def gaps(self, context: Sequence[int], tokens: Sequence[int]) -> tuple[float, float, float]:
        """(gap, top_two, tolerance) for the token after `context`, in logits.

        gap: best logit minus the smallest of `tokens`. All in the wider dtype.
        """
        import torch

        with torch.inference_mode():
            exact = self._logits(self.exact, context).double()  # [positions, V]
            rough = self._logits(self.model, context).double()
        best = exact.topk(2, dim=-1).indices
        gap_exact, gap_rough = (z.gather(1, best).diff(dim=1).neg() for z in (exact, rough))
        last = exact[-1]
        return (
            float(last.max() - last[list(tokens)].min()),
            float(gap_exact[-1]),
            SAFETY * float((gap_exact - gap_rough).abs().max()),
        )

    @staticmethod
    def _logits(model: Transformer, context: Sequence[int]) -> Any:
        import torch

        from tidar_ref.cache import KVCache
        from tidar_ref.masks import causal_mask

        width, device = len(context), model.device
        cache = KVCache(
            model.config, batch=1, max_len=width, scratch=0, dtype=model.dtype, device=device
        )
        ids = torch.tensor([list(context)], device=device)
        positions = torch.arange(width, device=device)[None]
        hidden = model(ids, positions, cache, causal_mask(width).to(device))
        return model.lm_head(hidden[0, -NOISE_POSITIONS:])
