"""evalplus 0.3.1 as a neighbour process: never imported here, because it cannot live in ours.

Its checks inherit the address space of whoever calls them (after a few mapped GiB right programs
fail), its settings are read at import, and it runs generated programs. So `evalplus_scores` starts
evalplus' own command line on a data file cut down to the problems asked for, in namespaces without
network where the kernel allows them, and reads its results file. `sanitise` asks a worker process.

evalplus 0.3.1 fails every answer to HumanEval/32 (its special check never records a success). The
verdicts keep that, and carry beside it our own check of that one problem ("repaired").
"""

from __future__ import annotations

import atexit
import gzip
import importlib.util
import json
import logging
import os
import queue
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.sandbox import CHILD, run_program
from bench.tasks.task import Progress
from tidar_ref.errors import UserError

LOG = logging.getLogger(__name__)

OVERRIDES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
FIND_ZERO = "HumanEval/32"
FIND_ZERO_TIMEOUT_S = 60.0  # evalplus' own ceiling for all inputs of a problem
MEMORY_BYTES = 8 * 1024**3  # Mbpp/255's own reference needs more than the default of 4 GiB
MIN_TIME_LIMIT_S = 4  # per input; the default of 1 s fails right programs on a loaded machine
SANITISE_TIMEOUT_S = 20.0  # its time grows with the cube of the lines
START_TIMEOUT_S = 60.0  # import of the sanitiser on a loaded machine
# All a child gets of our environment: tokens and keys stay out of reach of generated programs.
KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")

# Starts evalplus as the first process of new namespaces: when it dies, all it started dies.
LAUNCHER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import sandbox_child
sandbox_child.isolate()
child = os.fork()
if child == 0:
    command = [sys.executable, "-P", "-m", "evalplus.evaluate", *sys.argv[2:]]
    os.execv(sys.executable, command)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""

# One JSON line in, one out; "ready" first, so that the import is not on a program's clock.
SANITISER = """
import json, sys
from evalplus.sanitize import sanitize
answers, sys.stdout = sys.stdout, sys.stderr
print(json.dumps("ready"), file=answers, flush=True)
for line in sys.stdin:
    code, entry_point = json.loads(line)
    try:
        answer = [sanitize(code, entry_point), ""]
    except Exception as error:
        answer = [code, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), file=answers, flush=True)
"""

# |poly(x)| <= atol for the x of the answer, as evalplus means to check it. NaN is not <= atol.
FIND_ZERO_CHECK = """
import copy, json, math
space = {{"__name__": "answer"}}
exec(compile({program!r}, "<answer>", "exec"), space)
for arguments in json.loads({inputs!r}):
    x = space["find_zero"](*copy.deepcopy(arguments))
    assert abs(sum(c * math.pow(x, i) for i, c in enumerate(arguments[0]))) <= {atol!r}, arguments
"""


@dataclass(frozen=True, kw_only=True)
class EvalplusVerdict:
    """One program; plus needs base too, as evalplus counts. Repaired differs in HumanEval/32."""

    base: bool
    plus: bool
    base_repaired: bool
    plus_repaired: bool


@dataclass(frozen=True, kw_only=True)
class Sanitised:
    """What the sanitiser made of a program; with a fault ("" if none) the program as it was."""

    program: str
    fault: str


def evalplus_scores(
    dataset: str,
    programs: Mapping[str, str],
    *,
    data_file: Path,
    work_dir: Path,
    timeout_s: float = 1800.0,
    parallel: int = 2,
    progress: Progress | None = None,
) -> dict[str, EvalplusVerdict]:
    """evalplus' verdict on one whole program per problem, for any subset of the problems.

    dataset: "humaneval" or "mbpp"; data_file: the evalplus release file (.jsonl or .jsonl.gz).
    work_dir receives the cut data file, samples, log, results and expected outputs (up to 0.8 GB).
    UserError: unknown dataset or problem id, evalplus missing. TimeoutError: not done in time, its
    processes are killed. RuntimeError: evalplus broke off; the message ends with its last words.
    """
    if dataset not in OVERRIDES:
        raise UserError(f"evalplus has no dataset {dataset!r}: use {' or '.join(OVERRIDES)}")
    if not programs:
        return {}
    _require_evalplus()
    work_dir = work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    subset, samples = work_dir / f"{dataset}.jsonl", work_dir / f"{dataset}_samples.jsonl"
    results = work_dir / f"{dataset}_samples_eval_results.json"
    results.unlink(missing_ok=True)  # evalplus would reuse it whatever the samples say now
    rows = _write_subset(data_file, programs, subset)
    with samples.open("w", encoding="utf-8") as file:
        for id, program in programs.items():
            file.write(json.dumps({"task_id": id, "solution": program}) + "\n")
    arguments = [
        "--dataset", dataset, "--samples", str(samples),
        "--parallel", str(parallel), "--min_time_limit", str(MIN_TIME_LIMIT_S),
    ]  # fmt: skip
    environment = _environment() | {
        OVERRIDES[dataset]: str(subset),
        "HOME": str(work_dir),  # macOS has its cache there and ignores the next line
        "XDG_CACHE_HOME": str(work_dir / "cache"),
        "PYTHONUSERBASE": site.getuserbase(),
        # macOS refuses address space limits; with one set, everything would fail.
        "EVALPLUS_MAX_MEMORY_BYTES": "-1" if sys.platform == "darwin" else str(MEMORY_BYTES),
    }
    log = work_dir / f"{dataset}_evalplus.log"
    verdicts = _run(arguments, environment, results, log, timeout_s, progress)
    return {
        id: _verdict(verdicts[id], program, rows.get(id)) for id, program in programs.items()
    }


def sanitise(prompt: str, completion: str, entry_point: str) -> str:
    """evalplus.sanitize.sanitize(prompt + completion, entry_point).

    When it takes too long or raises, the program comes back as it was and a warning is logged.
    """
    return sanitise_many([(prompt, completion, entry_point)])[0].program


def sanitise_many(
    items: Sequence[tuple[str, str, str]], *, timeout_s: float = SANITISE_TIMEOUT_S
) -> list[Sanitised]:
    """As `sanitise` for each (prompt, completion, entry_point); timeout_s holds for each alone."""
    done = []
    for prompt, completion, entry_point in items:
        program = prompt + completion
        text, fault = _WORKER.ask(program, entry_point, timeout_s)
        if fault:
            LOG.warning("%s: left unsanitised: %s", entry_point, fault)
        done.append(Sanitised(program=program if fault else text, fault=fault))
    return done


def _require_evalplus() -> None:
    if importlib.util.find_spec("evalplus") is None:
        raise UserError("evalplus is not installed: run pip install evalplus==0.3.1")


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}


def _write_subset(
    data_file: Path, programs: Mapping[str, str], subset: Path
) -> dict[str, dict[str, Any]]:
    """Write the lines of the problems asked for, byte for byte; give HumanEval/32 if among them."""
    opener = gzip.open if data_file.suffix == ".gz" else open
    seen: set[str] = set()
    kept: dict[str, dict[str, Any]] = {}
    with (
        opener(data_file, "rt", encoding="utf-8") as lines,
        subset.open("w", encoding="utf-8") as out,
    ):
        for line in lines:
            if not line.strip():
                continue
            row = json.loads(line)
            if row["task_id"] in programs:
                seen.add(row["task_id"])
                out.write(line if line.endswith("\n") else line + "\n")
                if row["task_id"] == FIND_ZERO:
                    kept[FIND_ZERO] = row
    missing = [id for id in programs if id not in seen]
    if missing:
        raise UserError(f"{data_file.name} has no problem {missing[0]!r}: correct the id")
    return kept


def _run(
    arguments: list[str],
    environment: dict[str, str],
    results: Path,
    log: Path,
    timeout_s: float,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run evalplus until its results are there; these. Nothing of it survives this call."""
    started = time.monotonic()
    told = 0.0
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", LAUNCHER, str(CHILD.parent), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=results.parent,
            env=environment,
            start_new_session=True,
        )
        try:
            while True:
                code = process.poll()
                # Writing them is its last act, after which a watcher thread of its sleeps for up
                # to 20 s: not waited for.
                if (verdicts := _complete(results)) is not None:
                    return verdicts
                if code is not None:
                    raise RuntimeError(f"evalplus left with status {code}: {_last_words(log)}")
                spent = time.monotonic() - started
                if spent >= timeout_s:
                    words = _last_words(log)
                    raise TimeoutError(f"evalplus was not done after {timeout_s:g} s: {words}")
                if progress is not None and spent - told >= 30.0:
                    told = spent
                    progress(f"evalplus: {spent:.0f} s so far")
                time.sleep(0.1)
        finally:
            _kill_session(process)


def _complete(results: Path) -> dict[str, Any] | None:
    """Verdicts per problem, or None while the file is missing or half written."""
    if not results.is_file() or not (text := results.read_text(encoding="utf-8")).endswith("}"):
        return None
    try:
        return json.loads(text)["eval"]
    except json.JSONDecodeError:
        return None  # the outer object is closed last, so a half file never parses


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of it has ended; macOS answers so for a group of zombies
    process.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-3:])[-500:] or "it said nothing"


def _verdict(
    samples: list[dict[str, Any]], program: str, find_zero: dict[str, Any] | None
) -> EvalplusVerdict:
    """Of the one sample of a problem; find_zero is HumanEval/32's row, None for all others."""
    (sample,) = samples
    base = sample["base_status"] == "pass"
    plus = base and sample["plus_status"] == "pass"
    base_repaired, plus_repaired = base, plus
    if find_zero is not None:
        base_repaired = _finds_zeros(program, find_zero, "base_input")
        plus_repaired = base_repaired and _finds_zeros(program, find_zero, "plus_input")
    return EvalplusVerdict(
        base=base, plus=plus, base_repaired=base_repaired, plus_repaired=plus_repaired
    )


def _finds_zeros(program: str, row: Mapping[str, Any], inputs: str) -> bool:
    """Whether find_zero of the program finds a root of each polynomial in row[inputs]."""
    source = FIND_ZERO_CHECK.format(
        program=program, inputs=json.dumps(row[inputs]), atol=row["atol"]
    )
    return run_program(source, timeout_s=FIND_ZERO_TIMEOUT_S).passed


class _SanitiserProcess:
    """One sanitiser that answers line by line; killed when too slow and started again on demand."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()

    def ask(self, program: str, entry_point: str, timeout_s: float) -> tuple[str, str]:
        """(sanitised program, "") or (anything, what went wrong)."""
        with self._lock:
            process = self._started()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([program, entry_point]) + "\n")
                process.stdin.flush()
                answer = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                self._stop()
                return program, f"no answer within {timeout_s:g} s"
            except BrokenPipeError:
                answer = ""
            except BaseException:
                self._stop()  # the answer still to come would be taken for the next one's
                raise
            if not answer:
                self._stop()
                return program, "the sanitiser process died"
            text, fault = json.loads(answer)
            return text, fault

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        _require_evalplus()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", SANITISER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment() | {"HOME": os.devnull, "PYTHONUSERBASE": site.getuserbase()},
            encoding="utf-8",
            start_new_session=True,
        )
        self._answers = queue.Queue()
        threading.Thread(
            target=_forward, args=(self._process.stdout, self._answers), daemon=True
        ).start()
        try:
            ready = self._answers.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            ready = ""
        if not ready:
            self._stop()
            raise RuntimeError("evalplus' sanitiser did not start: try `import evalplus.sanitize`")
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if process.stdin is not None:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # what it never read is of no use to anybody


def _forward(lines: IO[str], answers: queue.Queue[str]) -> None:
    """Put each line into the queue, and an empty one when the process is gone."""
    with lines:
        for line in lines:
            answers.put(line)
    answers.put("")


_WORKER = _SanitiserProcess()
atexit.register(_WORKER.close)
