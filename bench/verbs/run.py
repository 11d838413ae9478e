"""`bench run` and `bench reproduce`: run a profile, then tables (and the report)."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.verbs import RUNS
from tidar_ref.errors import UserError

if TYPE_CHECKING:
    from bench.harness import Prepared
    from bench.profiles import Profile
    from bench.records import Measurement, RunHeader
    from bench.store import Key, RunStore


def add(verbs: Any) -> None:
    """Both verbs and their options."""
    words = {
        "reproduce": "run what suits this machine (or --profile), then write tables and report",
        "run": "run a profile, then print and write the tables",
    }
    for name, text in words.items():
        verb = verbs.add_parser(name, help=text, description=text)
        _options(verb, name)
        verb.set_defaults(action=act)


def _options(verb: argparse.ArgumentParser, name: str) -> None:
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


def act(args: argparse.Namespace, words: list[str]) -> int:
    """Generate, score, write tables; 130 when interrupted."""
    if args.profile == "h100-steps":
        return _run_book(args, words)
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


def _run_book(args: argparse.Namespace, words: list[str]) -> int:
    from bench.slots.commands import run_book

    if args.verb == "run":
        raise UserError("h100-steps is no decoding run; use: bench reproduce --profile h100-steps")
    run_book(args, runs=RUNS, argv=words)
    return 0


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
            rate = row.decode_tokens / row.decode_s if row.decode_s > 0 else 0.0
            bar.set_description(f"{row.task} {row.decoder}")
            bar.set_postfix_str(f"{rate:.1f} tokens/s")
            bar.update()

        harness.generate_all(prepared, store, on_done=show)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
