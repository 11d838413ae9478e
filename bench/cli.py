"""The command line: the only place with argparse, and the only one that prints.

Verbs: reproduce, run, tables, report, claims, figures, export, slots, autotune, audit, train,
compare, regress, doctor, peers. Bad input is one sentence and exit code 2, an interrupted run says
how to go on and exits 130, an audit that finds a bug and a gate that finds a regression exit 1.
Heavy libraries are imported by the verbs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.harness import Prepared
    from bench.profiles import Profile
    from bench.records import Measurement, RunHeader
    from bench.store import Key, RunStore

RUNS = Path("runs")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    top = _Parser(prog="python -m bench", description="TiDAR benchmarks")
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    words = {
        "reproduce": "run what suits this machine (or --profile), then write tables and report",
        "run": "run a profile, then print and write the tables",
    }
    for verb, text in words.items():
        _run_options(verbs.add_parser(verb, help=text, description=text), verb)
    tables = verbs.add_parser("tables", help="make the tables of a record folder again")
    tables.add_argument("record", type=Path, metavar="RECORD")
    report = verbs.add_parser("report", help="one page of one or more records: HTML and Markdown")
    report.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    report.add_argument("--out", type=Path, help="folder for the page (default: a sole record's)")
    tune = verbs.add_parser("autotune", help="which K and outcomes would be fastest for a record")
    tune.add_argument("record", type=Path, metavar="RECORD")
    tune.add_argument("--widths", type=Path, help="CSV: width,seconds (default: the record's own)")
    tune.add_argument("--decoder", help="dense tidar run to learn acceptance from: the largest K")
    tune.add_argument("--task", help="learn from and compare on this task only")
    tune.add_argument("--top", type=int, default=10, help="settings to print")
    audit = verbs.add_parser("audit", help="do a record's lossless decoders give ar's tokens?")
    audit.add_argument("record", type=Path, metavar="RECORD")
    audit.add_argument("--weights", help="where the record's weights are, if not where it says")
    audit.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    audit.add_argument("--data-dir", type=Path, help="folder with the benchmark files")
    doctor = verbs.add_parser("doctor", help="what this machine can run, and how to get the rest")
    doctor.add_argument("--data-dir", type=Path)
    _gate_options(verbs)
    _page_options(verbs)
    train = verbs.add_parser("train", help="train an adapter by a named recipe; resumes")
    train.add_argument("--recipe", required=True, metavar="NAME", help="see docs/training.md")
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
    train.add_argument("--lr", type=float)
    train.add_argument("--seed", type=int)
    train.add_argument("--device", help="cpu, cuda, cuda:N or auto")
    train.add_argument("--threads", type=int)
    train.add_argument("--rehearse", action="store_true", help="the same job in two minutes: tiny")
    _slots_options(verbs)
    peers = verbs.add_parser("peers", help="time our AR against transformers' generate")
    peers.add_argument("--weights", default="embedded")
    peers.add_argument("--device", default="cpu")
    peers.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    peers.add_argument("--threads", type=int)
    peers.add_argument("--max-new-tokens", type=int, default=64)
    peers.add_argument("--rounds", type=int, default=5)
    peers.add_argument("--out", type=Path)
    return top


def _slots_options(verbs: Any) -> None:
    slots = verbs.add_parser("slots", help="what a forward costs by width, KV length and batch")
    slots.add_argument("--weights", default="embedded", help="as for run; random:SHAPE for speed")
    slots.add_argument("--widths", default="1,2,4,8,16,20,32,64,72,128,256,272,512")
    slots.add_argument("--kv", default="256,1024", help="cached tokens, comma-separated")
    slots.add_argument("--batch", default="1", help="sequences, comma-separated")
    slots.add_argument("--decoders", nargs="*", help="whose steps to time (default: ar, tidar)")
    slots.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16")
    slots.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    slots.add_argument("--out", type=Path, help="record folder; the same command continues it")
    slots.add_argument("--budget-seconds", type=float, help="stop cleanly after this long")
    slots.add_argument("--rounds", type=int, default=8, help="visits of each cell")
    slots.add_argument("--samples", type=int, default=4, help="timed runs a visit")
    slots.add_argument("--seed", type=int, default=0)
    slots.add_argument("--no-split", action="store_true", help="skip attention, MLP, head, rest")
    slots.add_argument("--ceilings", action="store_true", help="measure copy, read, matrix rates")
    slots.add_argument("--tables", type=Path, metavar="RECORD", help="only make its tables again")


def _page_options(verbs: Any) -> None:
    claims = verbs.add_parser("claims", help="every published number, ours beside it, a verdict")
    claims.add_argument("records", type=Path, nargs="*", metavar="RECORD", help="besides results/")
    claims.add_argument("--format", choices=("table", "csv", "json"), default="table")
    claims.add_argument("--source", help='only this source, e.g. "Table 2" or "Figure 4"')
    figures = verbs.add_parser("figures", help="the paper's figures with ours beside them")
    figures.add_argument("records", type=Path, nargs="*", metavar="RECORD")
    figures.add_argument("--out", type=Path, required=True, help="folder for SVG, PDF and PNG")
    export = verbs.add_parser("export", help="a record in lm-eval's or evalplus' own files")
    export.add_argument("record", type=Path, metavar="RECORD")
    export.add_argument("--format", choices=("lm-eval", "evalplus"), required=True)
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--data-dir", type=Path, help="folder with the benchmark files")


def _gate_options(verbs: Any) -> None:
    compare = verbs.add_parser("compare", help="two records: counters equal, speedups not lower?")
    compare.add_argument("base", type=Path, metavar="BASE", help="regress record or run folder")
    compare.add_argument("head", type=Path, metavar="HEAD")
    regress = verbs.add_parser("regress", help="measure for `compare`, or against a git ref")
    regress.add_argument("--base", metavar="REF", help="git ref to measure interleaved with this")
    regress.add_argument("--out", type=Path, help=f"file or folder (default: under {RUNS}/)")
    regress.add_argument("--rounds", type=int, default=40, help="turns per decoder, without --base")
    regress.add_argument("--blocks", type=int, default=5, help="A B B A blocks per process")
    regress.add_argument("--processes", type=int, default=16, help="most restarts of both sides")
    regress.add_argument("--decoders", nargs="+", help="default: all, and some variants")
    regress.add_argument("--device", default="cpu")
    regress.add_argument("--threads", type=int, default=1)
    for verb in (compare, regress):
        verb.add_argument("--tolerance", type=float, default=0.05, help="share a speed may fall by")
        verb.add_argument("--strict", action="store_true", help="undecided timings fail too")
        verb.add_argument("--junit", type=Path, help="write JUnit XML here")
        verb.add_argument("--gab", type=Path, help="write github-action-benchmark JSON here")


def _run_options(verb: argparse.ArgumentParser, name: str) -> None:
    verb.add_argument("--profile", required=name == "run", help="smoke, embedded, small or paper")
    verb.add_argument("--decoders", nargs="+", help="ar,tidar:block_len=4,beta=1 ...")
    verb.add_argument("--tasks", nargs="+", help="names, with commas or blanks between")
    verb.add_argument("--limit", type=int, help="first N problems of each task")
    verb.add_argument("--device", help="cpu, cuda, cuda:N or auto")
    verb.add_argument("--dtype", help="float32 or bfloat16")
    verb.add_argument("--weights", help="embedded, random:SHAPE, a .gguf, a folder or a hub id")
    verb.add_argument("--data-dir", type=Path, help="folder with the benchmark files")
    verb.add_argument("--out", type=Path, help=f"record folder to make (default: under {RUNS}/)")
    verb.add_argument("--max-new-tokens", type=int, help="cap on new tokens per problem")
    verb.add_argument("--style", choices=("base", "chat"))
    verb.add_argument("--repeats", type=int, help="generations per problem and decoder")
    verb.add_argument("--clock", choices=("total", "per_step"), help="per_step splits host time")
    verb.add_argument(
        "--fixed-length", action="store_true", help="speed run: every output to the limit, no score"
    )
    verb.add_argument(
        "--telemetry",
        action=argparse.BooleanOptionalAction,
        help="watch power, clocks and counters (default: on a GPU)",
    )
    if name == "reproduce":
        verb.add_argument("--budget-seconds", type=float, help="h100-steps: stop after this long")
        verb.add_argument("--rehearse", action="store_true", help="h100-steps: tiny, on the CPU")
    verb.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    again = verb.add_mutually_exclusive_group()
    again.add_argument("--resume", type=Path, metavar="DIR", help="continue this record folder")
    again.add_argument("--fresh", action="store_true", help="never continue an unfinished run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; exit code: 0, 1 for a finding, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(words)
        if args.verb == "slots" or getattr(args, "profile", None) == "h100-steps":
            return _slots(args, words)
        return {"run": _run, "reproduce": _run}.get(args.verb, _other)(args, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _other(args: argparse.Namespace, words: list[str]) -> int:
    if args.verb == "tables":
        from bench.tables import write_tables

        print(write_tables(args.record), end="")
    elif args.verb == "report":
        from bench.report.build import write_report

        for path in write_report(args.records, args.out):
            print(f"report: {path}")
    elif args.verb == "autotune":
        from bench.autotune import report as autotune_report

        print(
            autotune_report(
                args.record,
                widths=args.widths,
                decoder=args.decoder,
                task=args.task,
                top=args.top,
            ),
            end="",
        )
    elif args.verb == "audit":
        from bench.audit import audit, to_markdown

        made = audit(args.record, weights=args.weights, device=args.device, data_dir=args.data_dir)
        print(to_markdown(made), end="")
        return 1 if made.bugs else 0
    elif args.verb in ("compare", "regress"):
        return _gate(args)
    elif args.verb in ("claims", "figures", "export"):
        return _page(args)
    elif args.verb == "train":
        return _train(args, words)
    elif args.verb == "doctor":
        from bench.doctor import report

        print(report(args.data_dir))
    else:
        from bench import peers

        for name in ("rounds", "max_new_tokens", "threads"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is below 1; give at least 1")
        peers.main(
            weights=args.weights,
            device=args.device,
            dtypes=tuple(args.dtypes.split(",")),
            threads=args.threads,
            max_new_tokens=args.max_new_tokens,
            rounds=args.rounds,
            out=args.out,
        )
    return 0


def _train(args: argparse.Namespace, words: list[str]) -> int:
    from bench.recipes import get_recipe
    from bench.tasks.data import data_folder
    from bench.train import changed, rehearsal, train

    recipe = changed(
        get_recipe(args.recipe),
        weights=args.weights,
        device=args.device,
        objective={"alpha": args.alpha, "masking": args.masking, "block_lens": args.block_lens},
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


def _slots(args: argparse.Namespace, words: list[str]) -> int:
    from bench.slots.commands import run_book, slots

    if args.verb == "run":
        raise UserError("h100-steps is no decoding run; use: bench reproduce --profile h100-steps")
    (slots if args.verb == "slots" else run_book)(args, runs=RUNS, argv=words)
    return 0


def _page(args: argparse.Namespace) -> int:
    if args.verb == "claims":
        from bench.claims_verdict import page

        print(page(args.records, form=args.format, source=args.source), end="")
        return 0
    if args.verb == "figures":
        from bench.figures import draw_all

        written = draw_all(args.records, args.out)
    else:
        from bench.export import export

        written = export(args.record, args.format, args.out, data_dir=args.data_dir)
    for path in written:
        print(f"written: {path}")
    return 0


def _gate(args: argparse.Namespace) -> int:
    from bench.compare import commands, writers

    def say(line: str) -> None:
        print(line, flush=True)

    if args.verb == "compare":
        found = commands.compare_records(args.base, args.head, args.tolerance)
    else:
        how = commands.Measuring(device=args.device, threads=args.threads, decoders=args.decoders)
        out = args.out or commands.default_out(RUNS)
        if args.base is None:
            if args.junit or args.gab:
                raise UserError("--junit and --gab need something to compare; add --base REF")
            record, file = commands.regress_alone(how, rounds=args.rounds, out=out)
            for label, reason in record.not_measured.items():
                say(f"not measured: {label}: {reason}")
            say(f"record: {file} ({', '.join(record.decoders)})")
            return 0
        found, files = commands.regress_against(
            args.base,
            how,
            out=out,
            tolerance=args.tolerance,
            blocks=args.blocks,
            most=args.processes,
            say=say,
        )
        say("records: " + " ".join(map(str, files)))
    print(writers.to_text(found), end="")
    for path in writers.write(found, junit=args.junit, gab=args.gab):
        print(f"written: {path}")
    return found.exit_code(strict=args.strict)


def profile_from(args: argparse.Namespace) -> Profile:
    """The named (or chosen) profile with the options given on the command line."""
    from bench.profiles import TaskSpec, get_profile, parse_decoders

    if args.profile is None:
        from bench.doctor import choose_profile

        choice = choose_profile()
        print(f"profile: {choice.profile} (chosen: {'; '.join(choice.reasons)})")
        profile = get_profile(choice.profile)
    else:
        profile = get_profile(args.profile)
        print(f"profile: {profile.name}")
    changes: dict[str, Any] = {
        name: value
        for name in (
            "device",
            "dtype",
            "weights",
            "max_new_tokens",
            "style",
            "repeats",
            "clock",
        )
        if (value := getattr(args, name)) is not None
    }
    if args.fixed_length:
        changes["stopping"] = "fixed"
    if args.decoders:
        changes["decoders"] = parse_decoders(args.decoders)
    tasks = profile.tasks
    if args.tasks:
        named = [name for word in args.tasks for name in word.split(",") if name]
        limits = {task.name: task.limit for task in profile.tasks}
        tasks = tuple(TaskSpec(name=n, limit=limits.get(n)) for n in dict.fromkeys(named))
        changes["fallback"] = ()  # tasks asked for by name are run or refused, never replaced
    if args.limit is not None:
        tasks = tuple(dataclasses.replace(task, limit=args.limit) for task in tasks)
    return dataclasses.replace(profile, tasks=tasks, **changes)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    from bench import harness
    from bench import store as record_store

    # Both are looked at again when the record is opened; here it spares the loading of weights.
    if args.resume:
        record_store.read_header(args.resume)
    elif args.out:
        record_store.check_free(args.out)
    profile = profile_from(args)
    prepared = harness.prepare(profile, data_dir=args.data_dir)
    header = harness.make_header(prepared, words)
    _print_findings(prepared, header)
    if args.dry_run:
        print("dry run: nothing was generated or written")
        return 0
    store = _open_store(args, header)
    try:
        _generate(prepared, store, words, telemetry=args.telemetry)
        harness.write_vocabulary(prepared, store)
        harness.score_all(prepared, store, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        verb = "reproduce" if args.verb == "reproduce" else "run"
        print(
            f"\ninterrupted after {len(store.done)} of {prepared.count} generations, all kept; "
            f"go on with the same options and: python -m bench {verb} ... --resume {store.folder}",
            file=sys.stderr,
        )
        return 130
    finally:
        store.close()
    from bench.tables import write_tables

    print("\n" + write_tables(store.folder))
    print(f"record: {store.folder}")
    if args.verb == "reproduce":
        from bench.report.build import write_report

        for path in write_report([store.folder]):
            print(f"report: {path}")
    return 0


def _print_findings(prepared: Prepared, header: RunHeader) -> None:
    from bench.tables import weights_label

    env, weights = header.environment, header.weights
    machine = env["gpu"] or f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores"
    print(f"device: {prepared.device} ({machine}), {prepared.dtype}")
    print(f"weights: {weights['name']} ({weights_label(weights)})")
    print(f"  sha256: {weights['sha256'] or 'none, made from a seed'}")
    for name, data in header.data.items():
        checked = "checksum as pinned" if data["checked"] else f"sha256 {data['sha256'][:16]}"
        print(f"data: {name}: {data['kind']}: {data['path']} ({checked})")
    for note in prepared.notes:
        print(f"note: {note}")
    problems = ", ".join(f"{len(ids)} {name}" for name, ids in header.problems.items())
    print(
        f"to do: {prepared.count} generations = {problems} x decoders "
        f"{' and '.join(header.decoders)} x {prepared.profile.repeats} repeat(s)",
        flush=True,
    )


def _open_store(args: argparse.Namespace, header: RunHeader) -> RunStore:
    from bench.environment import device_slug
    from bench.store import RunStore, find_unfinished

    if args.resume:
        return _resumed(RunStore.resume(args.resume, header))
    if args.verb == "reproduce" and not args.fresh and not args.out:
        unfinished = find_unfinished(RUNS, header)
        if unfinished:
            return _resumed(RunStore.resume(unfinished, header))
    if args.out:
        return RunStore.create(args.out, header)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    commit = (header.commit or "nocommit")[:7]
    stem = f"{day}_{device_slug(header.device)}_{header.profile['name']}_{commit}"
    folder, number = RUNS / stem, 2
    while folder.exists():
        folder, number = RUNS / f"{stem}-{number}", number + 1
    return RunStore.create(folder, header)


def _resumed(store: RunStore) -> RunStore:
    print(f"resuming {store.folder}: {len(store.done)} generations are there")
    return store


def _generate(
    prepared: Prepared, store: RunStore, words: list[str], *, telemetry: bool | None
) -> None:
    from bench.store import TELEMETRY, planned_keys
    from bench.telemetry import watching

    left = [key for key in planned_keys(store.header) if key not in store.done]
    print(f"record: {store.folder}", flush=True)
    if not left:
        return
    with watching(store.folder / TELEMETRY, device=prepared.device, wanted=telemetry) as watch:
        print("\n".join(watch.lines), flush=True)
        watch.idle()
        _generate_watched(prepared, store, words, left, watch.note)


def _generate_watched(
    prepared: Prepared, store: RunStore, words: list[str], left: list[Key], note: dict[str, Any]
) -> None:
    from tqdm import tqdm

    from bench import harness
    from bench.environment import portable

    warm = harness.warm_up(prepared)
    store.note_session(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": [portable(word) for word in words],
            "already_done": len(store.done),
            "warm_up": warm,
            "telemetry": note,
        }
    )
    limits = {
        (name, problem.id): harness.token_limit(prepared.profile, problem)
        for name, chosen in prepared.problems.items()
        for problem in chosen
    }
    seconds = sum(
        limits[task, problem] / max(warm[decoder]["tokens_per_s"], 1e-3)
        for decoder, task, problem, _ in left
    )
    print(f"time: at most about {_duration(seconds)} of decoding, from the warm-up", flush=True)
    with tqdm(total=len(left), unit="gen", disable=None, dynamic_ncols=True) as bar:

        def show(row: Measurement) -> None:
            rate = (row.output_tokens - 1) / row.decode_s if row.decode_s > 0 else 0.0
            bar.set_description(f"{row.task} {row.decoder}")
            bar.set_postfix_str(f"{rate:.1f} tokens/s")
            bar.update()

        harness.generate_all(prepared, store, on_done=show)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
