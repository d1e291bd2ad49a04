"""The parent of one program, which it does not let outlive their owner.

Run as a script by its path (`python -I -S guardian.py OWNER_PID STATUS_FD ...`), with the standard library alone: it
is up in some 30 ms, and needs nothing that the program's environment could break. `child.py` starts it.

Two processes, each a subreaper, so that no orphan escapes to init:

    owner ── keeper ── guardian ── program ── its children, theirs, ...

The *guardian* blocks on the lifeline (its stdin, a pipe that only the owner writes to). When that ends, however the
owner died, it kills every descendant and unlinks the shared memory they made. The *keeper* only waits for the
guardian: if something kills that one, the program's orphans fall to the keeper, which kills them. The other way round,
Ray kills a worker's direct children before the worker exits; that is the keeper, and the guardian is still there.

The lifeline carries JSON lines: first `{"argv", "env", "cwd", "linger_s", "scratch"}`, then any number of
`{"stop": grace_s}`. With `scratch` the program gets a TMPDIR of its own, which goes when it has gone. The status pipe
carries the answers, each with its `event`: `failed` (errno, strerror, path) or `started` (pid, guardian, scratch),
`exited` (status: the return code, negative for a signal), `gone` (killed, shm_removed).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200  # <linux/inotify.h>
INOTIFY_EVENT = struct.Struct("iIII")

SHM = "/dev/shm"
SHM_LOOKS_AFTER_S = (0.0, 0.02, 0.1, 0.5, 1.0)
RESET = (
    signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT, signal.SIGTERM, signal.SIGXFSZ,
)  # fmt: skip
# a program begins with their defaults; a shell ignores SIGINT and SIGQUIT for what it starts with `&`
LIFELINE_FD = 0


class Process(NamedTuple):
    """What `/proc/<pid>/stat` says of a process."""

    parent: int
    state: str

    @property
    def dead(self) -> bool:
        """Whether it only waits to be reaped."""
        return self.state in "ZX"


def processes() -> dict[int, Process]:
    """Returns every process that `/proc` shows, zombies included."""
    found = {}
    for pid in all_pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        found[pid] = Process(int(parent), state.decode())
    return found


def all_pids() -> list[int]:
    """Returns the ids that `/proc` lists."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(roots: Iterable[int]) -> dict[int, Process]:
    """Returns the children of `roots`, their children and so on, without the roots; zombies included."""
    everyone = processes()
    children: dict[int, list[int]] = {}
    for pid, process in everyone.items():
        children.setdefault(process.parent, []).append(pid)
    found: dict[int, Process] = {}
    todo = list(roots)
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in found:
                found[pid] = everyone[pid]
                todo.append(pid)
    return {pid: process for pid, process in found.items() if pid not in set(roots)}


def kill(pids: Iterable[int]) -> None:
    """Sends SIGKILL to each; one that is gone, or belongs to another user, is passed over."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def reaped() -> Iterator[tuple[int, int]]:
    """Yields (pid, return code) of each dead child.

    Raises:
        ChildProcessError: no child is left, dead or alive. For a subreaper: no descendant either.
    """
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def kill_descendants(on_exit: Callable[[int, int], None] = lambda pid, status: None) -> set[int]:
    """Kills this subreaper's descendants until none is left, and returns those that it found living.

    A descendant may fork between the walk and the kill; its orphan is then ours, and the next round's.
    """
    killed: set[int] = set()
    pause_s = 0.002
    while True:
        try:
            for pid, status in reaped():
                on_exit(pid, status)
        except ChildProcessError:
            return killed
        ours = descendants([os.getpid()])
        kill(ours)
        killed.update(pid for pid, process in ours.items() if not process.dead)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)  # one stuck in the kernel may take long


def libc() -> ctypes.CDLL:
    """Returns the C library that this process has."""
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Sets one of this process's kernel attributes."""
    if libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class SharedMemory:
    """The segments in /dev/shm that our descendants made.

    Python, torch and NCCL pick names at random, and after SIGKILL nothing removes them. So each name that appears is
    looked for among what our descendants have open or mapped; one that none of them holds is somebody else's.
    """

    def __init__(self) -> None:
        self.fd = self._inotify()
        self.look_at_s: float | None = None
        self._unclaimed: dict[str, int] = {}
        self._ours: dict[str, int] = {}
        self._looks = 0

    @staticmethod
    def _inotify() -> int | None:
        """Watches /dev/shm, where there is one, and inotify has a place left."""
        c = libc()
        fd: int = c.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            return None
        if c.inotify_add_watch(fd, SHM.encode(), IN_CREATE | IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE) < 0:
            os.close(fd)
            return None
        return fd

    def note(self) -> None:
        """Reads the names that came and went."""
        assert self.fd is not None
        for mask, name in _inotify_events(os.read(self.fd, 65536)):
            self._unclaimed.pop(name, None)
            self._ours.pop(name, None)
            if mask & (IN_CREATE | IN_MOVED_TO) and (inode := _shm_inode(name)):
                self._unclaimed[name] = inode
                self._looks = 0
        self._plan()

    def look(self) -> None:
        """Claims the names whose inode one of our descendants holds (a semaphore's name is a later link to it)."""
        held = _shm_inodes_held(descendants([os.getpid()]))
        self._ours.update({name: inode for name, inode in self._unclaimed.items() if inode in held})
        self._unclaimed = {name: inode for name, inode in self._unclaimed.items() if inode not in held}
        self._looks += 1
        if self._looks == len(SHM_LOOKS_AFTER_S):
            self._unclaimed = {}
        self._plan()

    def _plan(self) -> None:
        self.look_at_s = time.monotonic() + SHM_LOOKS_AFTER_S[self._looks] if self._unclaimed else None

    def remove(self) -> list[str]:
        """Unlinks what is left of ours once all descendants are dead, unless a stranger still holds it."""
        left = {name: inode for name, inode in self._ours.items() if _shm_inode(name) == inode}
        held = _shm_inodes_held(all_pids()) if left else set()
        removed = []
        for name in sorted(name for name, inode in left.items() if inode not in held):
            try:
                os.unlink(f"{SHM}/{name}")
            except OSError:
                continue
            removed.append(name)
        return removed


def _inotify_events(data: bytes) -> Iterator[tuple[int, str]]:
    """Yields (mask, name) of each event; the kernel never cuts one in two."""
    at = 0
    while at < len(data):
        _, mask, _, length = INOTIFY_EVENT.unpack_from(data, at)
        at += INOTIFY_EVENT.size
        yield mask, os.fsdecode(data[at : at + length].rstrip(b"\0"))
        at += length


def _shm_inode(name: str) -> int | None:
    """Returns the inode of a regular file in /dev/shm."""
    try:
        found = os.lstat(f"{SHM}/{name}")
    except OSError:
        return None
    return found.st_ino if stat.S_ISREG(found.st_mode) else None


def _shm_inodes_held(pids: Iterable[int]) -> set[int]:
    """Returns the inodes in /dev/shm that any of `pids` has open or mapped."""
    return {inode for pid in pids for held in (_shm_opened, _shm_mapped) for inode in held(pid)}


def _shm_opened(pid: int) -> set[int]:
    try:
        paths = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:  # it died, or is another user's
        return set()
    found = set()
    for path in paths:
        try:
            if os.readlink(path).startswith(SHM + "/"):
                found.add(os.stat(path).st_ino)
        except OSError:  # closed meanwhile
            continue
    return found


def _shm_mapped(pid: int) -> set[int]:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return set()
    return {int(line.split(None, 5)[4]) for line in lines if f" {SHM}/".encode() in line}


class Guardian:
    """Starts the program, then waits for its end, a command, or the owner's death.

    Args:
        status_fd: where events are reported.
        owner_fd: a pidfd of the owner, for a lifeline that a fork of the owner still holds open; None without one.
    """

    def __init__(self, status_fd: int, owner_fd: int | None) -> None:
        self.status_fd = status_fd
        self.program = 0
        self.linger_s = 0.0
        self.kill_at_s: float | None = None
        self.killed: set[int] = set()
        self.alone = False
        self.received = b""
        self.shm = SharedMemory()
        self.wake_fd = _wake_on(signal.SIGCHLD, signal.SIGTERM)
        self.handlers: dict[int, Callable[[], None]] = {
            LIFELINE_FD: self.read_lifeline,
            self.wake_fd: self.read_signals,
        }
        if self.shm.fd is not None:
            self.handlers[self.shm.fd] = self.shm.note
        if owner_fd is not None:
            self.handlers[owner_fd] = self.kill_now

    def run(self, program_fds: Sequence[int]) -> None:
        """Serves one program from start to end; `program_fds` are its stdin and stdout, or empty."""
        spec = self.read_spec()
        if spec is None:
            return
        try:
            scratch = make_scratch(spec["env"]) if spec["scratch"] else None
        except OSError as error:
            self.report("failed", errno=error.errno, strerror=error.strerror, path=error.filename)
            return
        try:
            self.guard(spec, program_fds, scratch)
        finally:
            remove(scratch)

    def guard(self, spec: dict[str, Any], program_fds: Sequence[int], scratch: str | None) -> None:
        """Starts the program, and sees it and its descendants end."""
        self.linger_s = spec["linger_s"]
        self.program, failure = spawn(spec["argv"], spec["env"], spec["cwd"], program_fds)
        for fd in program_fds:
            os.close(fd)
        if failure:
            self.report("failed", **failure)
            return
        self.report("started", pid=self.program, guardian=os.getpid(), scratch=scratch)
        self.watch()
        remove(scratch)
        self.report("gone", killed=sorted(self.killed), shm_removed=self.shm.remove())

    def read_spec(self) -> dict[str, Any] | None:
        """Returns the first line of the lifeline; None if the owner died before it was written."""
        while b"\n" not in self.received:
            data = os.read(LIFELINE_FD, 65536)
            if not data:
                return None
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        spec: dict[str, Any] = json.loads(line)
        return spec

    def watch(self) -> None:
        """Returns when no descendant is left."""
        poll = select.poll()
        for fd in self.handlers:
            poll.register(fd, select.POLLIN)
        while not self.alone:
            for fd, _ in poll.poll(self.timeout_ms()):
                self.handlers[fd]()
            if _due(self.shm.look_at_s):
                self.shm.look()
            if _due(self.kill_at_s):
                self.killed = kill_descendants(self.on_exit)
                return

    def timeout_ms(self) -> float | None:
        """Returns how long the loop may sleep."""
        times = [at_s for at_s in (self.kill_at_s, self.shm.look_at_s) if at_s is not None]
        return max(0.0, (min(times) - time.monotonic()) * 1000) if times else None

    def read_lifeline(self) -> None:
        """Obeys the owner; its death is the end."""
        data = os.read(LIFELINE_FD, 65536)
        if not data:
            self.kill_now()
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            self.stop(json.loads(line)["stop"])

    def stop(self, grace_s: float) -> None:
        """Asks the program's main process alone, as vLLM wants it, to end; the rest die with the deadline."""
        if self.program and grace_s > 0:
            os.kill(self.program, signal.SIGTERM)
        self.kill_within(grace_s)

    def read_signals(self) -> None:
        """Reaps; SIGTERM is the end."""
        if signal.SIGTERM in os.read(self.wake_fd, 4096):
            self.kill_now()
        try:
            for pid, status in reaped():
                self.on_exit(pid, status)
        except ChildProcessError:
            self.alone = True

    def on_exit(self, pid: int, status: int) -> None:
        """Reports the program's own end, after which those it left behind may linger a moment."""
        if pid == self.program:
            self.program = 0
            self.report("exited", status=status)
            self.kill_within(self.linger_s)

    def kill_now(self) -> None:
        """Ends all at the next turn of the loop."""
        self.kill_within(0.0)

    def kill_within(self, seconds: float) -> None:
        """Brings the deadline forward, never back."""
        at_s = time.monotonic() + seconds
        self.kill_at_s = at_s if self.kill_at_s is None else min(at_s, self.kill_at_s)

    def report(self, event: str, **values: object) -> None:
        """Tells the owner, if there still is one."""
        try:
            os.write(self.status_fd, json.dumps({"event": event, **values}).encode() + b"\n")
        except BrokenPipeError:
            return


def make_scratch(env: dict[str, str]) -> str:
    """Makes a directory for the program's temporary files, and puts it into its environment."""
    scratch = os.path.join(env.get("TMPDIR") or "/tmp", f"varcas-{os.urandom(6).hex()}")
    os.mkdir(scratch, 0o700)
    env["TMPDIR"] = scratch
    return scratch


def remove(directory: str | None) -> None:
    """Removes a directory, if there is one, with all that lies in it."""
    if directory is not None:
        import shutil  # late: it would cost every start a quarter of its time

        shutil.rmtree(directory, ignore_errors=True)


def _due(at_s: float | None) -> bool:
    return at_s is not None and time.monotonic() >= at_s


def _wake_on(*signals: signal.Signals) -> int:
    """Returns a file descriptor on which each of `signals` arrives as a byte."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return read_fd


def spawn(
    argv: list[str], env: dict[str, str], cwd: str | None, fds: Sequence[int]
) -> tuple[int, dict[str, Any] | None]:
    """Starts the program in a session of its own; returns its pid, and why it could not be executed or None."""
    read_fd, write_fd = os.pipe()
    guardian = os.getpid()
    pid = os.fork()
    if not pid:
        become(argv, env, cwd, fds, guardian, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        failure = pipe.read()  # empty: exec closed the other end
    return pid, json.loads(failure) if failure else None


def become(
    argv: list[str], env: dict[str, str], cwd: str | None, fds: Sequence[int], guardian: int, failure_fd: int
) -> NoReturn:
    """Turns this fork into the program, or writes why not."""
    blamed = argv[0]
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guardian:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in RESET:
            signal.signal(number, signal.SIG_DFL)
        stdin, *stdout = fds or (os.open(os.devnull, os.O_RDONLY),)
        os.dup2(stdin, 0)
        for fd in stdout:
            os.dup2(fd, 1)
        if cwd is not None:
            blamed = cwd
            os.chdir(cwd)
            blamed = argv[0]
        os.execvpe(argv[0], argv, env)  # noqa: S606 - no shell is the point
    except OSError as error:
        report = {"errno": error.errno, "strerror": error.strerror, "path": blamed}
        os.write(failure_fd, json.dumps(report).encode())
    except ValueError as error:  # a NUL, or a "=" in a variable's name
        report = {"errno": errno.EINVAL, "strerror": str(error), "path": blamed}
        os.write(failure_fd, json.dumps(report).encode())
    finally:
        os._exit(127)


def keep(guardian: int) -> None:
    """Waits for the guardian; if that did not end its work, does it for it. SIGTERM is passed on."""
    over = False
    while not over:
        if signal.sigwait([signal.SIGCHLD, signal.SIGTERM]) == signal.SIGTERM:
            os.kill(guardian, signal.SIGTERM)
        try:
            over = any(pid == guardian for pid, _ in reaped())
        except ChildProcessError:
            over = True
    kill_descendants()


def watch_owner(owner: int) -> int | None:
    """Returns a pidfd of our parent, None where the kernel has none (before Linux 5.3).

    Raises:
        ProcessLookupError: the owner is dead already.
    """
    try:
        fd = os.pidfd_open(owner)
    except ProcessLookupError:
        raise
    except OSError:
        fd = None
    if os.getppid() != owner:
        raise ProcessLookupError
    return fd


def main(args: Sequence[str]) -> None:
    """Runs the keeper and the guardian; `args` are OWNER_PID STATUS_FD [STDIN_FD STDOUT_FD]."""
    owner, *fds = (int(arg) for arg in args)
    for fd in fds:
        os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGCHLD, signal.SIGTERM])
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        owner_fd = watch_owner(owner)
    except ProcessLookupError:
        return
    if pid := os.fork():
        for fd in (LIFELINE_FD, *fds):
            os.close(fd)
        keep(pid)
        return
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # a fork does not inherit it
    status_fd, *program_fds = fds
    Guardian(status_fd, owner_fd).run(program_fds)


if __name__ == "__main__":
    main(sys.argv[1:])
