"""The verbs on a plan: open or continue the record, run it, write tables and figure."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.slots.plan import DECODERS, Plan, slots_plan
from bench.slots.record import HEADER, OK, SlotsStore, Visit, difference, read_header
from tidar_ref.errors import UserError


def slots(args: argparse.Namespace, *, runs: Path, argv: Sequence[str]) -> None:
    """`bench slots` with its parsed options; UserError for what no run could have."""
    if args.tables:
        from bench.slots.page import write_page

        print(write_page(args.tables), end="")
        for path in draw_all(args.tables):
            print(f"written: {path}")
        return
    from bench.harness import DTYPES, resolve_device

    if args.dtype not in DTYPES:
        raise UserError(f"unknown dtype {args.dtype!r}; choose one of {', '.join(DTYPES)}")
    named = DECODERS if args.decoders is None else _labels(args.decoders)
    plan = slots_plan(
        weights=args.weights,
        widths=_numbers("--widths", args.widths),
        kv_lens=_numbers("--kv", args.kv),
        batches=_numbers("--batch", args.batch),
        decoders=named,
        dtype=args.dtype,
        device=resolve_device(args.device),
        rounds=args.rounds,
        samples=args.samples,
        seed=args.seed,
        ceilings=args.ceilings,
        split=not args.no_split and not args.compile,
        attention=args.attention,
        compiled=args.compile,
    )
    _check_budget(args.budget_seconds)
    measure(
        plan,
        out=args.out,
        runs=runs,
        argv=argv,
        budget_s=args.budget_seconds,
        telemetry=args.telemetry,
    )


def run_book(args: argparse.Namespace, *, runs: Path, argv: Sequence[str]) -> None:
    """`bench reproduce --profile h100-steps`; options that would change the list are refused."""
    from bench.harness import resolve_device
    from bench.steps import expected_s, h100_steps, rehearsal

    foreign = ("decoders", "tasks", "limit", "dtype", "weights", "max_new_tokens", "style",
               "repeats", "clock", "fixed_length", "fresh")  # fmt: skip
    for name in foreign:
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"h100-steps is a fixed list and takes no {flag}; use bench slots")
    _check_budget(args.budget_seconds)
    plan = rehearsal() if args.rehearse else h100_steps(resolve_device(args.device or "cuda"))
    print(f"profile: {plan.name}: {len(plan.jobs)} jobs, {plan.visits} visits of cells")
    for job in plan.jobs:
        print(f"  {job.name}: {len(job.cells)} cells, about {job.expected_s:.0f} s on an H100")
    print(f"  in all about {expected_s(plan) / 60:.0f} min on an H100 (estimated)")
    if args.dry_run:
        print("dry run: nothing was measured or written")
        return
    measure(
        plan,
        out=args.out or args.resume,
        runs=runs,
        argv=argv,
        budget_s=args.budget_seconds,
        rehearsal=args.rehearse,
        telemetry=args.telemetry,
    )


def _labels(words: Sequence[str]) -> tuple[str, ...]:
    from bench.profiles import parse_decoders

    return tuple(spec.label for spec in parse_decoders(list(words))) if words else ()


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"{flag} {text!r} is no list of whole numbers; write 1,2,4") from error
    if not values or min(values) < 1:
        raise UserError(f"{flag} {text!r}: give whole numbers from 1, with commas")
    return tuple(dict.fromkeys(values))


def _check_budget(seconds: float | None) -> None:
    if seconds is not None and seconds <= 0:
        raise UserError(f"--budget-seconds {seconds:g} leaves no time; give more than 0")


def measure(
    plan: Plan,
    *,
    out: Path | None,
    runs: Path,
    argv: Sequence[str],
    budget_s: float | None = None,
    rehearsal: bool = False,
    telemetry: bool | None = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run `plan` into `out` (default: a folder under `runs`, an unfinished one first).

    telemetry: watch the device from another process; None means on a CUDA device only.
    """
    from tqdm import tqdm

    from bench import environment
    from bench.slots import engine
    from bench.slots.page import write_page
    from bench.store import TELEMETRY
    from bench.telemetry import watching

    header = engine.make_header(plan, argv)
    folder = out or _folder(plan, runs, header)
    store = SlotsStore.open(folder, header)
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [environment.portable(word) for word in argv],
        "visits_done": len(store.done),
        "budget_s": budget_s,
    }
    say(f"record: {folder} ({len(store.done)} visits there)")
    finished = False
    try:
        with (
            watching(folder / TELEMETRY, device=plan.device, wanted=telemetry) as watch,
            tqdm(total=plan.visits, initial=len(store.done), unit="visit", disable=None) as bar,
        ):
            for line in watch.lines:
                tqdm.write(line)
            watch.idle()
            store.note_session({**session, "telemetry": watch.note})

            def show(visit: Visit) -> None:
                bar.set_description(f"{visit.job} {visit.what}")
                bar.set_postfix_str(
                    f"{1000 * min(visit.total_s):.3g} ms" if visit.status == OK else visit.status
                )
                bar.update()

            finished = engine.run(
                plan, store, budget_s=budget_s, on_visit=show, say=tqdm.write, rehearsal=rehearsal
            )
    except KeyboardInterrupt:
        say("interrupted; every finished visit is kept, the same command continues")
        raise
    finally:
        store.close()
    say("\n" + write_page(folder))
    for path in draw_all(folder):
        say(f"written: {path}")
    if not finished:
        say(
            f"the budget of {budget_s:g} s is spent: the same command with --out {folder} continues"
        )
    return folder


def draw_all(folder: Path) -> list[Path]:
    """The figure of the plan's Figure 1 job, and one of every other job with forwards."""
    from bench.figures.slots import draw_slots
    from bench.slots.record import read_slots

    plan = read_slots(folder).plan
    others = [job.name for job in plan.jobs if job.widths and job.name != plan.figure1]
    return [path for job in (None, *others) for path in draw_slots(folder, job)]


def _folder(plan: Plan, runs: Path, header: object) -> Path:
    """A record of this plan that the same command began, else a new name."""
    from bench.environment import device_slug

    stored = sorted(runs.glob(f"*/{HEADER}")) if runs.is_dir() else []
    for path in stored:
        if difference(read_header(path.parent), header) is None:  # type: ignore[arg-type]
            return path.parent
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    commit = (getattr(header, "commit", None) or "nocommit")[:7]
    stem = f"{day}_{device_slug(plan.device)}_{plan.name}_{commit}"
    folder, number = runs / stem, 2
    while folder.exists():
        folder, number = runs / f"{stem}-{number}", number + 1
    return folder
