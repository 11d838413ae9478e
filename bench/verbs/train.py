"""`bench train`: train an adapter by a named recipe; the same command goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.verbs import RUNS


def add(verbs: Any) -> None:
    """The verb and its options."""
    train = verbs.add_parser("train", help="train an adapter by a named recipe; resumes")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="see docs/training.md")
    what.add_argument(
        "--estimate",
        type=float,
        nargs="?",
        const=0.4,
        metavar="MFU",
        help="only say what the paper's runs would take on H100s at this MFU (default: 0.4)",
    )
    train.add_argument("--out", type=Path, help=f"folder of the run (default: {RUNS}/train-NAME)")
    train.add_argument("--data-dir", type=Path, help="folder with the training files")
    train.add_argument("--weights", help="another base: what `run --weights` takes")
    train.add_argument("--minutes", type=float, help="budget of time instead of the recipe's")
    train.add_argument("--tokens", type=int, help="budget of clean tokens instead")
    train.add_argument("--steps", type=int, help="budget of optimiser steps instead")
    train.add_argument("--batch", type=int, help="documents per optimiser step")
    train.add_argument("--block-lens", type=int, nargs="+", metavar="K")
    train.add_argument("--alpha", type=float, help="weight of the AR term")
    train.add_argument("--masking", choices=("full", "random"))
    train.add_argument(
        "--random-offset",
        action=argparse.BooleanOptionalAction,
        help="start the block grid anywhere in its first block, or aligned as in the paper",
    )
    train.add_argument("--compile", action="store_true", help="torch.compile all but attention")
    train.add_argument("--lr", type=float)
    train.add_argument("--seed", type=int)
    train.add_argument("--device", help="cpu, cuda, cuda:N or auto")
    train.add_argument("--threads", type=int)
    train.add_argument("--rehearse", action="store_true", help="the same job in two minutes: tiny")
    train.set_defaults(action=act)


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Train, or print the estimate; 130 if stopped before the budget was spent."""
    if args.estimate is not None:
        from bench.training_cost import estimate

        print(estimate(mfu=args.estimate, gpu="h100"), end="")
        return 0
    from bench.recipes import get_recipe
    from bench.tasks.data import data_folder
    from bench.train import changed, rehearsal, train

    recipe = changed(
        get_recipe(args.recipe),
        weights=args.weights,
        device=args.device,
        compiled=args.compile,
        objective={
            "alpha": args.alpha,
            "masking": args.masking,
            "block_lens": args.block_lens,
            "random_offset": args.random_offset,
        },
        train={"lr": args.lr, "batch": args.batch, "seed": args.seed},
        budget={"minutes": args.minutes, "tokens": args.tokens, "steps": args.steps},
    )
    if args.rehearse:
        recipe = rehearsal(recipe)
    out = args.out or RUNS / f"train-{recipe.name}"
    done = train(
        recipe, out=out, data_dir=data_folder(args.data_dir), argv=words, threads=args.threads
    )
    if not done.finished:
        print(f"go on with: python -m bench train --recipe {args.recipe} --out {out} ...")
        return 130
    return 0
