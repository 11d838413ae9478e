"""`python -m bench train`: run a recipe, show how it goes, and leave an adapter with its card.

The run folder holds the trainer's checkpoint and loss log, the corpus report, and the adapter as it
was last saved; a run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.recipes import Recipe, Source
from bench.training_cost import counter, peak_for
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.corpora.mixture import Corpus
    from bench.corpora.pairs import Pair
    from tidar_ref.checkpoint import LoadedModel
    from tidar_ref.training.network import TrainingNetwork
    from tidar_ref.training.trainer import StepLog, Trainer

ADAPTER_EVERY_S = 300.0
ADAPTER_FOLDER, HEAD_FOLDER = "adapter", "head"
LEARN = ("products", "all")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished or stopped run: its folder, steps done, and whether the budget was spent."""

    folder: Path
    steps: int
    finished: bool


def train(
    recipe: Recipe,
    *,
    out: Path,
    data_dir: Path | None,
    argv: Sequence[str],
    threads: int | None = None,
) -> Outcome:
    """Train (or go on training) in folder `out`. UserError for data or weights that are missing."""
    import torch
    from tqdm import tqdm

    from bench import heads
    from tidar_ref import checkpoint
    from tidar_ref.training.rows import Objective
    from tidar_ref.training.trainer import Meter, TrainConfig, Trainer, ranked, shard

    if recipe.learn not in LEARN:
        raise UserError(f"recipe {recipe.name} learns {recipe.learn!r}: use {' or '.join(LEARN)}")
    if recipe.compiled and recipe.head is not None:
        raise UserError(f"recipe {recipe.name} trains a draft head: leave out --compile")
    if threads is not None:
        torch.set_num_threads(threads)
    device = _join_ranks(_device(recipe.device))
    loaded = checkpoint.load(recipe.weights, device=device, dtype=recipe.dtype, prepare=False)
    corpus = _corpus(recipe, loaded, out, data_dir)
    if recipe.head is not None:
        network = heads.network(recipe, loaded, corpus.examples)
    else:
        network = _network(recipe, loaded)
    if ranked():
        network = shard(network)
    objective, config = Objective(**recipe.objective), TrainConfig(**recipe.train)
    count, peak = counter(recipe, loaded.model.config), peak_for(recipe, _gpu(device))
    meter = Meter(flops=count, peak=peak.flops_per_s if peak else None) if count else None
    trainer = Trainer(network, corpus.examples, objective, config, out, meter=meter)
    trained = sum(p.numel() for p in network.trained().values())
    say = print if trainer.rank == 0 else _silent
    say(f"recipe: {recipe.name}: {recipe.purpose}")
    say(f"weights: {loaded.source.name} on {device}; {trained / 1e6:.1f} M parameters learn")
    say(
        f"documents: {len(corpus.examples)} ({corpus.report['by_source']}), "
        f"{sum(len(e.tokens) for e in corpus.examples)} tokens"
    )
    if trainer.resume():
        say(f"resuming {out.name} at step {trainer.progress.step}")
    saved = [0.0]
    quiet = None if trainer.rank == 0 else True
    with tqdm(total=100, unit="%", disable=quiet, dynamic_ncols=True) as bar:

        def show(log: StepLog) -> None:
            parts = {"AR": log.ar_loss, "draft": log.diffusion_loss, "right": log.draft_accuracy}
            text = ", ".join(f"{k} {v:.3f}" for k, v in parts.items() if v is not None)
            rate = trainer.progress.tokens / trainer.progress.elapsed_s
            bar.set_postfix_str(f"step {log.step}, {text}, {rate:.0f} tokens/s{_speed(log)}")
            bar.update(round(100 * trainer.spent(), 1) - bar.n)
            full = recipe.adapter is None and recipe.head is None  # kept at the end only
            if not full and trainer.progress.elapsed_s - saved[0] > ADAPTER_EVERY_S:
                saved[0] = trainer.progress.elapsed_s
                _save(recipe, loaded, corpus, trainer, argv)

        trainer.run(show)
    _save(recipe, loaded, corpus, trainer, argv)
    if not trainer.rank:
        finish(out)
    finished = trainer.spent() >= 1.0
    say(f"{'finished' if finished else 'stopped'} after {trainer.progress.step} steps: {out}")
    return Outcome(folder=out, steps=trainer.progress.step, finished=finished)


def finish(out: Path) -> None:
    """Loss curves and card of a run's adapter."""
    from bench import cards
    from bench.figures import style, training

    made = [out / name for name in (ADAPTER_FOLDER, HEAD_FOLDER) if (out / name).is_dir()]
    (folder,) = made
    shutil.copy(out / "loss.jsonl", folder / "loss.jsonl")
    with style.styled():
        figure = training.draw({out.name: training.read_log(out)})
    for kind in ("png", "svg"):
        style.save(figure, folder / f"loss.{kind}", kind)
    cards.write_card(folder)


def changed(
    recipe: Recipe,
    *,
    weights: str | None,
    device: str | None,
    objective: dict[str, Any],
    train: dict[str, Any],
    budget: dict[str, Any],
    compiled: bool = False,
) -> Recipe:
    """The recipe with the options that were given (None: not given); a budget replaces its own."""
    asked = {name: value for name, value in budget.items() if value is not None}
    for name, value in asked.items():
        if value <= 0:
            raise UserError(f"--{name} {value} is no budget: give more than 0")
    base = dict(recipe.train)
    if asked:
        base = {n: v for n, v in base.items() if n not in ("steps", "minutes", "tokens")}
    given = {name: value for name, value in train.items() if value is not None}
    aims = {name: value for name, value in objective.items() if value is not None}
    if "block_lens" in aims:
        aims["block_lens"] = tuple(aims["block_lens"])
    return dataclasses.replace(
        recipe,
        weights=weights or recipe.weights,
        device=device or recipe.device,
        compiled=compiled or recipe.compiled,
        objective={**recipe.objective, **aims},
        train={**base, **asked, **given},
    )


def rehearsal(recipe: Recipe) -> Recipe:
    """The same job end to end in a minute or two on a CPU: tiny random weights, few documents."""
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-rehearsal",
        purpose=f"rehearsal of {recipe.name}: no number means anything",
        weights="random:tiny",
        device="cpu",
        train={
            **{n: v for n, v in recipe.train.items() if n not in ("minutes", "tokens")},
            "steps": 12,
            "batch": 4,
            "micro_batch": 2,
        },
        mixture=(Source(name="templates", count=24),),
        distil=("templates",) if recipe.distil else (),
        max_tokens=512,
    )


def hygiene(data_dir: Path | None) -> Any:
    """The filter of a recipe's pairs against every test set that is here: gives (kept, report)."""
    from bench.corpora.hygiene import Filter, references

    against = Filter(references(data_dir))

    def clean(pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, Any]]:
        kept, report = against.pairs(pairs)
        return kept, report.as_json()

    return clean


def _corpus(recipe: Recipe, loaded: LoadedModel, out: Path, data_dir: Path | None) -> Corpus:
    from bench.corpora import mixture

    eos = loaded.source.eos_token_ids
    if not eos:
        raise UserError(f"{loaded.source.name} names no end-of-sequence token: responses need one")
    corpus = mixture.build(
        recipe, loaded.tokenizer, eos_id=eos[0], data_dir=data_dir, clean=hygiene(data_dir)
    )
    if recipe.distil:
        from bench.distil import distilled

        corpus = distilled(corpus, loaded, recipe, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.json").write_text(json.dumps(corpus.report, indent=1) + "\n", encoding="utf-8")
    return corpus


def _save(
    recipe: Recipe, loaded: LoadedModel, corpus: Corpus, trainer: Trainer, argv: Sequence[str]
) -> None:
    """Write the adapter or head as it stands, with what made it."""
    from bench import full_tune, heads
    from bench.environment import describe, portable
    from tidar_ref.training import adapters

    kept: dict[str, Any] = {}
    if recipe.head is None and recipe.adapter is None:
        adapter, kept = full_tune.stored(recipe, trainer)
    elif recipe.head is None:
        # Sharded parameters are gathered by all ranks together; the first one writes.
        adapter = adapters.adapter_of(trainer.network, mask_token_id=loaded.source.mask_token_id)
    if trainer.rank:
        return
    peak = peak_for(recipe, _gpu(str(trainer.device)))
    notes = {
        "recipe": dataclasses.asdict(recipe),
        "command": " ".join(portable(word) for word in argv),
        "base_sha256": loaded.source.sha256,
        "base_adapters": loaded.source.adapters,
        "steps": trainer.progress.step,
        "clean_tokens": trainer.progress.tokens,
        "training_s": round(trainer.progress.elapsed_s, 1),
        "corpus": corpus.report,
        "environment": describe(trainer.device.type),
        "ranks": trainer.world,
        "peak": {"device": peak.name, "flops_per_s": peak.flops_per_s} if peak else None,
        **kept,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if recipe.head is not None:
        heads.save(trainer.network, trainer.folder / HEAD_FOLDER, notes)
        return
    folder = trainer.folder / ADAPTER_FOLDER
    base = loaded.source.name.partition(" + ")[0]
    adapters.save(adapter, folder, loaded.model.config, base=base, notes=notes)


def _network(recipe: Recipe, loaded: LoadedModel) -> TrainingNetwork:
    from tidar_ref.training.adapters import AdapterConfig
    from tidar_ref.training.network import TrainingNetwork
    from tidar_ref.training.trainer import ranked

    if recipe.compiled and ranked():
        raise UserError("--compile is not proven on several ranks: leave out --compile or torchrun")
    return TrainingNetwork(
        loaded.model,
        mask_token_id=loaded.source.mask_token_id,
        adapters=AdapterConfig(**recipe.adapter) if recipe.adapter else None,
        products_only=recipe.adapter is None and recipe.learn == "products",
        compiled=recipe.compiled,
    )


def _gpu(device: str) -> str | None:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _speed(log: StepLog) -> str:
    """The step's share of the peak, or its FLOP/s where no peak is known."""
    if log.mfu is not None:
        return f", MFU {log.mfu:.0%}"
    return "" if log.flops is None else f", {log.flops / log.seconds / 1e9:.1f} GFLOP/s"


def _device(wanted: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _join_ranks(device: str) -> str:
    """Join the process group when torchrun started us; gives this rank's device."""
    import torch
    import torch.distributed as dist

    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if not device.startswith("cuda"):
        return device
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _silent(text: str) -> None:
    """What ranks other than the first one say."""
