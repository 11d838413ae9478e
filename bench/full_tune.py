"""What is kept of a full fine-tune: the low-rank difference to its base, and how good it is.

The base is read again for this, so that training holds one copy of the weights; singular values of
every matrix take seconds to minutes, so it is done when a run ends or stops, and not in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.recipes import Recipe

if TYPE_CHECKING:
    from tidar_ref.training.adapters import Adapter
    from tidar_ref.training.network import TrainingNetwork
    from tidar_ref.training.rows import Rows
    from tidar_ref.training.trainer import Trainer

CHECKED_DOCUMENTS = 16


def stored(recipe: Recipe, trainer: Trainer) -> tuple[Adapter, dict[str, Any]]:
    """The difference of rank `stored_rank` and notes for the card; of several ranks all must call.

    Notes: kept_share (of the sum of squares of the products' difference, 0 to 1), outside_share
    (of what embeddings, norms and biases moved, in all that moved: stored is none of it), and the
    losses of the same documents as trained and as stored.
    """
    from tidar_ref import checkpoint
    from tidar_ref.training import adapters
    from tidar_ref.training.network import TrainingNetwork

    network = trainer.network
    tuned = adapters.tuned_state(network)
    rows = _documents(trainer)
    as_trained = _losses(network, rows, trainer)
    again = checkpoint.load(
        recipe.weights, device=str(trainer.device), dtype=recipe.dtype, prepare=False
    ).model
    base = again.state_dict()
    mask = network.mask_token_id
    adapter, kept = adapters.difference(base, tuned, rank=recipe.stored_rank, mask_token_id=mask)
    outside = adapters.outside_share(base, tuned, mask_token_id=mask)
    adapters.merge(again, adapters.rounded(adapter))
    as_stored = _losses(TrainingNetwork(again, mask_token_id=mask), rows, trainer)
    return adapter, {
        "stored_rank": recipe.stored_rank,
        "kept_share": kept,
        "outside_share": outside,
        "checked_documents": len(rows.documents),
        "loss_as_trained": as_trained,
        "loss_as_stored": as_stored,
    }


def _documents(trainer: Trainer) -> Rows:
    from tidar_ref.training.rows import build_rows

    chosen = trainer.examples[:CHECKED_DOCUMENTS]
    rows = build_rows(
        chosen,
        trainer.objective,
        mask_token_id=trainer.network.mask_token_id,
        seeds=range(len(chosen)),
    )
    return rows.to(trainer.device)


def _losses(network: TrainingNetwork, rows: Rows, trainer: Trainer) -> dict[str, float | None]:
    """AR and draft loss (nats per target) of these rows; None where there is no such target."""
    import torch

    from tidar_ref.training.rows import IGNORE

    with torch.no_grad():
        losses = network(rows, trainer.objective)
    wanted = rows.labels != IGNORE
    ar = int(wanted[: rows.clean].sum())
    weight = float(rows.weights[rows.clean :][wanted[rows.clean :]].sum())
    return {
        "ar": float(losses.ar_sum) / ar if ar and trainer.objective.alpha else None,
        "draft": float(losses.diffusion_sum) / weight if weight else None,
    }
