"""The card of an adapter: what it is, what made it, and where its numbers are. From files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.figures import training
from tidar_ref.errors import UserError

LAST_STEPS = 20
PLACEMENT = {
    "all": "on every row; merged into the weights for decoding",
    "mask": "on mask rows only: the AR half is the base model's, exactly",
}


def write_card(folder: Path) -> Path:
    """README.md of an adapter folder, from its tidar.json and loss.jsonl (beside or above it)."""
    path = folder / "tidar.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tidar.json: name a folder that `bench train` wrote")
    notes = json.loads(path.read_text(encoding="utf-8"))
    card = folder / "README.md"
    card.write_text(text(folder.name, notes, training.read_log(folder)), encoding="utf-8")
    return card


def text(name: str, notes: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The card as Markdown."""
    recipe, corpus, machine = notes["recipe"], notes["corpus"], notes["environment"]
    base = " + ".join([recipe["weights"].split("+")[0], *map(str, notes["base_adapters"])])
    lines = [
        f"# {name}",
        "",
        f"{recipe['purpose'][0].upper()}{recipe['purpose'][1:]}.",
        "",
        f"- Base: {base}; sha256 `{notes['base_sha256']}` (licence: the base model's, Apache-2.0"
        " for SmolLM2).",
        _what(notes),
        f"- Objective: `{json.dumps(recipe['objective'])}`.",
        f"- Trained: {notes['steps']} steps, {notes['clean_tokens']:,} clean tokens seen,"
        f" {notes['training_s'] / 60:.0f} minutes on {machine.get('gpu') or machine['cpu']}"
        f" ({machine['threads']} threads), torch {machine['versions']['torch']},"
        f" `{json.dumps(recipe['train'])}`.",
        *_arithmetic(notes, log),
        f"- Command: `python -m bench {notes['command']}`.",
        "",
        "## Documents",
        "",
        "| source | documents | tokens | too long | removed: repeats a test set |",
        "| --- | --- | --- | --- | --- |",
    ]
    checked: dict[str, Any] = {}
    for source, part in corpus["sources"].items():
        hygiene = part["hygiene"]
        checked |= hygiene["checked"]
        removed = sum(entry["removed"] for entry in hygiene["sources"].values())
        lines.append(
            f"| {source} | {part['documents']} | {part['tokens']:,} | {part['too_long']}"
            f" | {removed} |"
        )
    lines += ["", f"Compared with: {', '.join(sorted(checked)) or 'no test set'}."]
    if "distilled_by" in corpus:
        named = corpus.get("distilled_sources", list(corpus["sources"]))  # once: always all
        count = sum(corpus["sources"][source]["documents"] for source in named)
        lines.append(
            f"Answers of {', '.join(named)} were written by {corpus['distilled_by']} (greedy): "
            f"{corpus['same_as_source']} of {count} equal the source's, "
            f"{corpus['cut_at_the_limit']} were cut at the length limit."
        )
    last = log[-LAST_STEPS:]
    lines += ["", f"## Losses (mean of the last {len(last)} steps)", ""]
    for key, title in training.PANELS:
        values = [row[key] for row in last if row[key] is not None]
        if values:
            if key == "diffusion_loss" and recipe.get("head"):
                title = "draft loss (nats, summed over the unrolls with their weights)"
            lines.append(f"- {title}: {sum(values) / len(values):.3f}")
    lines += [
        "",
        "![loss curves](loss.png)",
        "",
        "Scores and tokens per forward are in the records under `results/records/` whose header"
        f" names this {'head' if recipe.get('head') else 'adapter'}.",
        "",
    ]
    return "\n".join(lines)


def _what(notes: dict[str, Any]) -> str:
    if notes["recipe"].get("head"):
        return (
            f"- Draft head in the layout of SpecForge: {notes['draft_vocab']:,} draft tokens, taps"
            f" at the inputs of layers {', '.join(map(str, notes['taps']))}; output rows started"
            " as the target's."
        )
    if notes["recipe"]["adapter"] is None:
        return _difference(notes)
    return (
        f"- Adapter: rank {notes['recipe']['adapter']['rank']}, {PLACEMENT[notes['placement']]}."
        f" Mask token id {notes['mask_token_id']}; its embedding row is `tidar.mask_embedding`."
    )


def _difference(notes: dict[str, Any]) -> str:
    learned = {
        "products": "the matrices of every layer and the mask token's embedding row learned",
        "all": "all parameters learned, and embeddings, norms and biases are not kept:"
        f" {notes['outside_share']:.1%} of what moved (sum of squares)",
    }[notes["recipe"]["learn"]]
    pairs = (("AR", "ar"), ("draft", "draft"))
    trained, kept = notes["loss_as_trained"], notes["loss_as_stored"]
    losses = ", ".join(
        f"{title} {trained[key]:.4f} as trained and {kept[key]:.4f} as kept"
        for title, key in pairs
        if trained[key] is not None
    )
    return (
        f"- Full fine-tune ({learned}), kept as a difference of rank {notes['stored_rank']}, which"
        f" holds {notes['kept_share']:.1%} of the matrices' change (sum of squares);"
        f" {PLACEMENT['all']}. Losses of {notes['checked_documents']} training documents: {losses}."
        f" Mask token id {notes['mask_token_id']}; its embedding row is `tidar.mask_embedding`."
    )


def _arithmetic(notes: dict[str, Any], log: list[dict[str, Any]]) -> list[str]:
    """One line on FLOPs, for runs whose log counts them."""
    counted = [row for row in log if row.get("flops")]
    if not counted:
        return []
    flops, seconds = (sum(row[key] for row in counted) for key in ("flops", "seconds"))
    rate, peak = flops / seconds, notes.get("peak")
    devices = notes.get("ranks", 1)
    share = (
        f"MFU {rate / (devices * peak['flops_per_s']):.1%} of {devices} x {peak['device']}"
        if peak
        else "no MFU: no 16-bit peak applies to this device and number format"
    )
    compiled = ", torch.compile" if notes["recipe"].get("compiled") else ""
    return [
        f"- Arithmetic: {flops:.2e} FLOPs needed over {len(counted)} steps,"
        f" {rate / 1e9:,.1f} GFLOP/s; {share}{compiled}."
    ]
