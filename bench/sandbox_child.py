"""The supervisor of one sandboxed program: a script for `bench.sandbox`, standard library only.

Reads a JSON request from stdin, isolates itself, forks the program, waits for its report or the
time limit, kills every descendant, and prints a JSON verdict.
"""

from __future__ import annotations

import _socket
import ctypes
import json
import os
import resource
import secrets
import select
import signal
import sys
import time
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWIPC, CLONE_NEWNS = (
    0x10000000,
    0x40000000,
    0x20000000,
    0x08000000,
    0x00020000,
)
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1  # Linux 5.12
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
FILE_BYTES = 16 * 1024**2
WRITE_EVENTS = {
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.utime": 1,
    "os.setxattr": 1,
    "os.removexattr": 1,
    "sqlite3.connect": 1,
}
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.fork",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.kill",
    "os.killpg",
    "pty.",
    "signal.",
    "shutil.chown",
    "resource.setrlimit",
    "resource.prlimit",
    "syslog.",
    "webbrowser.",
)


def main() -> None:
    request = json.load(sys.stdin)
    layer = isolate()
    if layer == "namespaces" and read_only_except(request["scratch"]):
        layer = "namespaces, read-only files"
    status, detail = supervise(request)
    sys.stdout.write(json.dumps({"status": status, "detail": detail, "isolation": layer}))


def isolate() -> str:
    """Enter new namespaces if the kernel allows it; adopt orphans in any case (Linux)."""
    if not sys.platform.startswith("linux"):
        return "audit hook"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    spaces = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    if libc.unshare(CLONE_NEWUSER | spaces) == 0:
        return "namespaces"
    return "audit hook"


def read_only_except(scratch: str) -> bool:
    """Whether the whole file tree could be made read-only for us, but for the scratch folder."""
    libc = ctypes.CDLL(None, use_errno=True)

    def set_attributes(path: str, flags: int, added: int, cleared: int) -> bool:
        wanted = (ctypes.c_uint64 * 4)(added, cleared, 0, 0)
        arguments = (ctypes.c_long(AT_FDCWD), os.fsencode(path), ctypes.c_long(flags))
        size = ctypes.c_long(ctypes.sizeof(wanted))
        return libc.syscall(ctypes.c_long(MOUNT_SETATTR), *arguments, wanted, size) == 0

    place = os.fsencode(scratch)
    return (
        libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) == 0
        and libc.mount(place, place, None, ctypes.c_ulong(MS_BIND), None) == 0
        and set_attributes("/", AT_RECURSIVE, MOUNT_ATTR_RDONLY, 0)
        and set_attributes(scratch, 0, 0, MOUNT_ATTR_RDONLY)
    )


def supervise(request: dict[str, Any]) -> tuple[str, str]:
    """Fork the program, wait for its report, and leave no descendant behind."""
    token = secrets.token_bytes(16)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run(request, token, writer)
    os.close(writer)
    deadline = time.monotonic() + request["timeout_s"]
    report = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        chunk = os.read(reader, 4096)
        report += chunk
        if not chunk:
            break
    timed_out = time.monotonic() >= deadline
    # A program that closed its pipe end is not finished yet: it has until the deadline to exit.
    code = None if timed_out else wait_until(child, deadline)
    kill_all(child)
    if code is None:
        return "timeout", f"no result within {request['timeout_s']:g} s"
    return judge(report, token, code)


def wait_until(child: int, deadline: float) -> int | None:
    """The child's wait status, or None at the deadline."""
    while time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return code
        time.sleep(0.001)
    return None


def judge(report: bytes, token: bytes, code: int) -> tuple[str, str]:
    """Only a report that starts with the token counts; whatever else happened is a failure."""
    if report.startswith(token):
        status, _, detail = report[len(token) :].decode(errors="replace").partition("\n")
        return status, detail
    if os.WIFSIGNALED(code):
        name = signal.Signals(os.WTERMSIG(code)).name
        return ("timeout" if name == "SIGXCPU" else "crashed"), f"killed by {name}"
    return "failed", f"left with exit status {os.waitstatus_to_exitcode(code)} before its end"


def kill_all(child: int) -> None:
    """Kill the program and everything it started, also what moved to another session."""
    for _ in range(200):
        pids = children() or []
        if child not in pids:
            pids.append(child)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def children() -> list[int]:
    """Direct children of this process; orphans of the program are among them (subreaper)."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def run(request: dict[str, Any], token: bytes, writer: int) -> None:
    """In the forked child: limits, hook, program, report. Never returns."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.chdir(request["scratch"])
    sys.path.insert(0, request["scratch"])
    for name, value in (
        ("RLIMIT_AS", request["memory_bytes"]),
        ("RLIMIT_CPU", int(request["timeout_s"]) + 1),
        ("RLIMIT_FSIZE", FILE_BYTES),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
    ):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):
            if sys.platform.startswith("linux"):
                raise  # only macOS may lack a limit (RLIMIT_AS)
    os.environ.clear()
    sys.addaudithook(guard(request["scratch"]))
    status, detail = "passed", ""
    try:
        # An empty namespace, as code_eval has it: __name__ is then that of builtins, so not
        # __main__, and a module that exists, which dataclasses look up.
        exec(compile(request["source"], "<program>", "exec"), {})
    except MemoryError as error:
        status, detail = "memory", repr(error)
    except BaseException as error:  # SystemExit and all others are failures
        status, detail = "failed", f"{type(error).__name__}: {error}"
    os.write(writer, token + f"{status}\n{detail[:500]}".encode(errors="replace"))
    os._exit(0)


def guard(scratch: str) -> Any:
    """An audit hook that refuses what a solution never needs (PEP 578)."""
    inside = scratch + os.sep
    real, fspath = os.path.realpath, os.fspath
    unix = getattr(_socket, "AF_UNIX", None)
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def check_path(path: Any) -> None:
        if isinstance(path, int):
            return  # a descriptor that was opened under this hook
        if isinstance(path, bytes):
            path = path.decode(errors="surrogateescape")
        place = real(fspath(path))
        if place != scratch and not place.startswith(inside) and place != os.devnull:
            raise PermissionError(f"sandbox: {place} is outside the scratch folder")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if mode else bool((flags or 0) & write_flags)
            # A descriptor of a folder elsewhere would let later calls name its files relatively.
            if writes or (not isinstance(path, int) and os.path.isdir(path)):
                check_path(path)
        elif event in WRITE_EVENTS:
            for path in args[: WRITE_EVENTS[event]]:
                check_path(path)
        elif event in ("os.chdir", "os.chroot"):
            check_path(args[0])
        elif event == "socket.__new__" and args[1] == unix:
            return  # asyncio wakes itself through a socket pair; connect and bind stay refused
        elif event.startswith(REFUSED) and event not in ("socket.gethostname", "signal.signal"):
            raise PermissionError(f"sandbox: {event} is refused")

    return hook


if __name__ == "__main__":
    main()
