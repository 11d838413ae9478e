"""The sandbox against programs that try to get away with something."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.sandbox import CHILD, ISOLATIONS, isolation, run_many, run_program


def test_right_and_wrong_programs() -> None:
    assert run_program("assert 1 + 1 == 2").passed
    wrong = run_program("assert 1 + 1 == 3")
    assert not wrong.passed and wrong.status == "failed" and "AssertionError" in wrong.detail
    assert isolation() in ISOLATIONS


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
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\nassert False",
    "exit from a thread": (
        "import os, threading, time\nthreading.Thread(target=lambda: os._exit(0)).start()\n"
        "time.sleep(1)"
    ),
    "exception that leaves": (
        "class E(Exception):\n    def __str__(self): __import__('os')._exit(0)\nraise E"
    ),
    "except hook": "import sys\nsys.excepthook = lambda *a: None\nraise ValueError",
    "own report": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "closed descriptors": "import os\nos.closerange(0, 64)\nassert False",
    "catches memory error": (
        "try: x = bytearray(10**12)\nexcept MemoryError: pass\nassert False"
    ),
    "thread bomb": (
        "import threading, time\nfor _ in range(5000):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "multiprocessing": (
        "import multiprocessing as m\np = m.Process(target=print)\np.start()\np.join()"
    ),
    "half a character": "x = '\ud800'",
    "null byte": "x = 1\0",
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
        "open('../sandbox-escape', 'w').write('x')",
        f"import sqlite3\nsqlite3.connect({str(tmp_path / 'new')!r}).execute('create table t(x)')",
        f"import os\nos.setxattr({str(kept)!r}, 'user.x', b'1')",
        f"import os\nos.remove('kept', dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
        f"open('mine', 'w').write('x')\nimport os\nos.replace('mine', {str(kept)!r})",
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


def test_what_right_programs_need_works() -> None:
    for source in (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "assert list(ThreadPoolExecutor(2).map(abs, [-1])) == [1]",
        "import tempfile\nopen(tempfile.mkstemp()[1], 'w').write('x')",
        "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return n and f(n - 1)\nf(8000)",
        "import random, uuid, hashlib, ctypes, numpy",
        "try: raise SystemExit\nexcept BaseException: pass",
    ):
        verdict = run_program(source, timeout_s=10.0)
        assert verdict.passed, (source, verdict)


AS_S = f"""
import os, sys
sys.path.insert(0, {str(CHILD.parent)!r})
import sandbox_child as s
"""


def run_child(script: str) -> subprocess.CompletedProcess[str]:
    """A script that has the supervisor as `s`, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", AS_S + script], capture_output=True, text=True, timeout=60
    )


def test_the_portable_layer_holds_without_namespaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "hook_only.py"
    child.write_text(AS_S + 's.isolate = lambda: "audit hook"\ns.main()\n')
    monkeypatch.setattr("bench.sandbox.CHILD", child)
    assert run_program("pass").isolation == "audit hook"
    test_no_network()
    (tmp_path / "files").mkdir()
    test_files_outside_the_scratch_folder_are_safe(tmp_path / "files")
    test_memory_limit()


def test_the_strong_layer_holds_without_the_hook(tmp_path: Path) -> None:
    """Network, mkfifo and shared memory, by code that no audit hook looks at."""
    if isolation() != ISOLATIONS[0]:
        pytest.skip(f"this machine gives: {isolation()}")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run_child(f"""
import json, socket
from multiprocessing import shared_memory
assert s.isolate() == "namespaces" and s.read_only_except({str(scratch)!r})
os.chdir({str(scratch)!r})
open("mine", "w").write("x")
refused = []
for name, act in {{
    "connect": lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1),
    "open": lambda: open({str(tmp_path / "new")!r}, "w"),
    "mkfifo": lambda: os.mkfifo({str(tmp_path / "new")!r}),
    "relative": lambda: open("../new", "w"),
    "shared memory": lambda: shared_memory.SharedMemory(create=True, size=10),
}}.items():
    try:
        act()
    except OSError:
        refused.append(name)
print(json.dumps(refused))
""")
    expected = ["connect", "open", "mkfifo", "relative", "shared memory"]
    assert done.returncode == 0 and json.loads(done.stdout) == expected, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "scratch"]


def test_output_is_dropped() -> None:
    assert run_program("print('x' * 10**6)\nimport sys\nsys.stderr.write('y' * 10**6)").passed


def test_descendants_die_with_the_program(tmp_path: Path) -> None:
    """Native code may fork past the audit hook; the namespace or the subreaper still ends it."""
    marker = f"sandbox-daemon-{os.getpid()}"
    done = run_child(f"""
import time
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
""")
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
