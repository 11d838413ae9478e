"""The sandbox against programs that try to get away with something."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from bench.sandbox import isolation, run_many, run_program


def test_right_and_wrong_programs() -> None:
    assert run_program("assert 1 + 1 == 2").passed
    wrong = run_program("assert 1 + 1 == 3")
    assert not wrong.passed and wrong.status == "failed" and "AssertionError" in wrong.detail
    assert isolation() in ("namespaces", "audit hook")


NASTY = {
    "sys.exit(0)": "import sys\nsys.exit(0)\nassert False",
    "os._exit(0)": "import os\nos._exit(0)",
    "raise SystemExit": "raise SystemExit(0)",
    "syntax error": "def f(:",
    "import failure": "import a_module_that_does_not_exist",
    "recursion": "def f(): return f()\nf()",
    "stdin": "input()",
    "system": "import os\nassert os.system('true') == 0",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "fork": "import os\nos.fork()",
    "ctypes": "import ctypes\nctypes.CDLL(None).getpid()",
    "kill": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "raise the limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)"
    ),
    "segfault": "import sys\nsys.setrecursionlimit(10**7)\ndef f(): return f()\nf()",
    "huge file": "open('x', 'wb').write(b'0' * 10**8)",
    "failure beside a thread": "import threading\nthreading.Thread(target=int).start()\n1/0",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "generator exit": "raise GeneratorExit",
    "environment": "import os\nassert os.environ",
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_programs_do_not_pass(name: str) -> None:
    assert not run_program(NASTY[name], timeout_s=2.0).passed


def test_time_limits_hold_even_when_signals_are_ignored() -> None:
    for source in (
        "while True: pass",
        "import signal\nfor s in (signal.SIGTERM, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)"
        "\nwhile True: pass",
        "sum(range(10**12))",
        "import time\ntime.sleep(60)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ):
        started = time.perf_counter()
        verdict = run_program(source, timeout_s=1.0)
        assert verdict.status == "timeout", (source, verdict)
        assert time.perf_counter() - started < 8.0


def test_memory_limit() -> None:
    verdict = run_program("x = bytearray(3 * 1024**3)")
    assert verdict.status == "memory", verdict


def test_a_never_ending_thread_does_not_hold_the_verdict() -> None:
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    verdict = run_program(source)
    assert verdict.passed and verdict.seconds < 8.0


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert not run_program(source).passed
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_the_scratch_folder_are_safe(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    for source in (
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"import pathlib\npathlib.Path({str(tmp_path / 'new')!r}).touch()",
        f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.symlink({str(kept)!r}, 'l')\nopen('l', 'w').write('x')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"open({str(kept)!r}, 'r+').write('x')",
    ):
        assert not run_program(source).passed, source
    assert kept.read_text() == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert run_program("open('inside', 'w').write('x')\nassert open('inside').read() == 'x'").passed


def test_environment_is_empty_and_name_is_not_main() -> None:
    os.environ["TIDAR_SECRET"] = "secret"
    try:
        assert run_program("import os\nassert 'TIDAR_SECRET' not in os.environ").passed
    finally:
        del os.environ["TIDAR_SECRET"]
    assert run_program("if __name__ == '__main__': raise ValueError").passed


def test_output_is_dropped() -> None:
    assert run_program("print('x' * 10**6)\nimport sys\nsys.stderr.write('y' * 10**6)").passed


def test_descendants_die_with_the_program(tmp_path: Path) -> None:
    """Native code may fork past the audit hook; the namespace or the subreaper still ends it."""
    import subprocess
    import sys

    # The same supervisor with a child that forks a daemon before the hook is in place.
    marker = f"sandbox-daemon-{os.getpid()}"
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[1] / "bench")!r})
import sandbox_child as s
def run(request, token, writer):
    if os.fork() == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(30)", {marker!r}])
    time.sleep(0.3)
    os.write(writer, token + b"passed\\n")
    os._exit(0)
s.run = run
s.isolate()
print(s.supervise({{"timeout_s": 5.0}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "passed" in done.stdout, done.stderr
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(p)]
    assert not alive


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_many_keeps_the_order() -> None:
    told: list[int] = []
    verdicts = run_many(["pass", "1/0", "pass"], progress=told.append)
    assert [v.passed for v in verdicts] == [True, False, True] and told == [1, 2, 3]
