"""Whatever ends the owner, the program or the guardian, nothing of the program is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from varcas import guardian
from varcas.child import Child, free_port, listener_is_ours

SERVERS = Path(__file__).with_name("servers")
ROLES = {"program", "child", "grandchild"}
SHM = Path("/dev/shm")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="children need Linux"),
    pytest.mark.timeout(60),
]


def eventually(true: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Polls until `true`, and says whether it became so."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Says whether a process lives (a zombie does not)."""
    process = guardian.processes().get(pid)
    return process is not None and not process.dead


@dataclass(frozen=True)
class Stubborn:
    """A run of `stubborn.py`."""

    report: Path

    @property
    def log(self) -> Path:
        return self.report.with_suffix(".log")

    def argv(self, *options: str) -> list[str]:
        return [sys.executable, str(SERVERS / "stubborn.py"), "--report", str(self.report), *options]

    def start(self, *options: str, linger_s: float = 0.5) -> Child:
        return Child.start(self.argv(*options), env=dict(os.environ), log=self.log, linger_s=linger_s)

    def rows(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.report.read_text().splitlines()] if self.report.exists() else []

    def settled(self) -> bool:
        """Waits until all three processes have their segment, and the guardian has seen them."""
        complete = eventually(lambda: {row["role"] for row in self.rows()} == ROLES)
        time.sleep(0.1)
        return complete and all((SHM / name).exists() for name in self.segments())

    def pids(self) -> list[int]:
        return [int(str(row["pid"])) for row in self.rows()]

    def segments(self) -> list[str]:
        return [str(row["shm"]) for row in self.rows()]

    def left(self) -> list[object]:
        """Returns what is left of it: living processes and segments."""
        processes = [pid for pid in self.pids() if alive(pid)]
        return [*processes, *(name for name in self.segments() if (SHM / name).exists())]

    def gone(self) -> bool:
        return not self.left()


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Stubborn]:
    run = Stubborn(tmp_path / "report")
    yield run
    guardian.kill(pid for pid in run.pids() if alive(pid))
    for name in run.segments():
        (SHM / name).unlink(missing_ok=True)


@contextlib.contextmanager
def an_owner(stubborn: Stubborn, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `owner.py` in a session of its own, as a terminal would."""
    argv = [sys.executable, "-m", "tests.servers.owner", "--report", str(stubborn.report), *options]
    owner = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=SERVERS.parent.parent)
    with owner:
        try:
            assert stubborn.settled()
            yield owner
        finally:
            owner.kill()


def run_sh(script: str, tmp_path: Path, **env: str) -> Child:
    return Child.start(["/bin/sh", "-c", script], env=env, log=tmp_path / "sh.log")


def test_stop_ends_the_program_and_all_it_started(stubborn: Stubborn) -> None:
    with stubborn.start() as child:
        assert stubborn.settled()
        assert child.poll() is None
        assert child.descendants() >= set(stubborn.pids())
        assert child.pid in stubborn.pids()
        began_s = time.monotonic()
        assert child.stop(grace_s=20) == -signal.SIGTERM
        assert time.monotonic() - began_s < 5
        assert stubborn.gone(), stubborn.left()
        assert set(child.killed) >= set(stubborn.pids()) - {child.pid}
        assert child.pid not in child.killed
        assert set(child.shm_removed) == set(stubborn.segments())
        assert child.descendants() == set()


def test_sigterm_goes_to_the_main_process_alone(tmp_path: Path) -> None:
    script = "trap 'echo main' TERM; sh -c \"trap 'echo other' TERM; while :; do sleep 0.05; done\" & wait; wait $!"
    with run_sh(script, tmp_path) as child:
        time.sleep(0.3)
        child.stop(grace_s=0.5)
    assert "main" in child.log.read_text().splitlines()
    assert "other" not in child.log.read_text().splitlines()


def test_a_program_that_ignores_sigterm_dies_after_its_grace(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        began_s = time.monotonic()
        assert child.stop(grace_s=0.7) == -signal.SIGKILL
        assert 0.7 <= time.monotonic() - began_s < 3
        assert stubborn.gone(), stubborn.left()


def test_a_shorter_grace_wins(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        patient = threading.Thread(target=child.stop, args=(30,))
        patient.start()
        began_s = time.monotonic()
        while child.poll() is None and time.monotonic() - began_s < 0.3:
            time.sleep(0.001)
        assert child.poll() is None
        assert child.stop(grace_s=0) == -signal.SIGKILL
        patient.join(5)
        assert not patient.is_alive()
        assert child.stop(grace_s=5) == -signal.SIGKILL
        assert time.monotonic() - began_s < 5


def test_a_longer_grace_changes_nothing(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        began_s = time.monotonic()
        hasty = threading.Thread(target=child.stop, args=(0.6,))
        hasty.start()
        time.sleep(0.2)
        assert child.stop(grace_s=30) == -signal.SIGKILL
        hasty.join()
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_nothing_outlives_the_owner(stubborn: Stubborn, number: signal.Signals) -> None:
    with an_owner(stubborn, "--ignore-sigterm") as owner:
        owner.send_signal(number)
        assert eventually(stubborn.gone), stubborn.left()


def test_nothing_outlives_the_owner_while_its_fork_holds_the_lifeline(stubborn: Stubborn) -> None:
    with an_owner(stubborn, "--fork") as owner:
        assert owner.stdout is not None
        forked = int(owner.stdout.readline().split()[1])
        owner.kill()
        try:
            assert eventually(stubborn.gone), stubborn.left()
            assert alive(forked)
        finally:
            os.kill(forked, signal.SIGKILL)


def test_nothing_outlives_the_owner_when_our_own_child_is_killed_first(stubborn: Stubborn) -> None:
    """Ray kills a worker's direct children before it exits (KillChildProcs in its core worker)."""
    with an_owner(stubborn) as owner:
        direct = [pid for pid, process in guardian.processes().items() if process.parent == owner.pid]
        assert len(direct) == 1
        os.kill(direct[0], signal.SIGKILL)
        time.sleep(0.2)
        assert all(alive(pid) for pid in stubborn.pids())
        owner.kill()
        assert eventually(stubborn.gone), stubborn.left()


def test_ctrl_c_does_not_reach_the_program(stubborn: Stubborn) -> None:
    with an_owner(stubborn) as owner:
        assert owner.stdout is not None
        os.killpg(owner.pid, signal.SIGINT)
        program, _ = owner.stdout.readline().split()
        assert owner.stdout.readline() == "interrupted\n"
        time.sleep(0.3)
        assert int(program) in stubborn.pids()
        assert all(alive(pid) for pid in stubborn.pids())


def test_no_session_is_shared(tmp_path: Path) -> None:
    with run_sh("exec sleep 60", tmp_path) as child:
        sessions = [os.getsid(pid) for pid in (os.getpid(), child._keeper.pid, child._guardian_pid, child.pid)]
    assert len(set(sessions)) == 4


def test_leftovers_of_a_program_that_exits_linger_and_die(stubborn: Stubborn) -> None:
    with stubborn.start("--then", "exit:3", linger_s=0.6) as child:
        assert child.wait(10) == 3
        began_s = time.monotonic()
        others = set(stubborn.pids()) - {child.pid}
        assert len(others) == 2
        time.sleep(0.2)
        assert all(alive(pid) for pid in others)
        assert eventually(stubborn.gone), stubborn.left()
        assert time.monotonic() - began_s > 0.4
        assert child.stop() == 3
        assert set(child.killed) >= others


def test_a_daemon_that_forks_on_and_on_is_caught(tmp_path: Path) -> None:
    script = "import os, time\nwhile True:\n if os.fork(): os._exit(0)\n os.setsid()\n time.sleep(0.02)"
    mark = uuid.uuid4().hex
    argv = [sys.executable, "-c", script, mark]
    with Child.start(argv, env={}, log=tmp_path / "log", linger_s=0.3) as child:
        assert child.wait(10) == 0
        assert any(mark.encode() in cmdline(pid) for pid in child.descendants())
        assert child.stop(grace_s=5) == 0
        assert child.killed
    assert not any(mark.encode() in cmdline(pid) for pid in guardian.all_pids())


def test_a_program_that_crashes_reports_its_signal(stubborn: Stubborn) -> None:
    with stubborn.start("--then", f"signal:{signal.SIGABRT}") as child:
        assert child.wait(10) == -signal.SIGABRT
        assert eventually(stubborn.gone), stubborn.left()
        assert child.stop() == -signal.SIGABRT


def test_a_killed_guardian_leaves_nothing(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        os.kill(child._guardian_pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert eventually(lambda: not any(alive(pid) for pid in stubborn.pids()))
        assert child.stop() == -signal.SIGKILL


def test_the_program_does_not_outlive_keeper_and_guardian(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        child._keeper.kill()
        os.kill(child._guardian_pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert eventually(lambda: not alive(child.pid))


@pytest.mark.parametrize("whole", [False, True], ids=["guardian", "guardian and keeper"])
def test_stop_is_bounded_when_the_guardian_hangs(
    stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr("varcas.child.ANSWER_S", 0.5)
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        os.kill(child._guardian_pid, signal.SIGSTOP)
        if whole:
            child._keeper.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        assert child.stop(grace_s=0.2) == -signal.SIGKILL
        assert time.monotonic() - began_s < 5
        assert not any(alive(pid) for pid in stubborn.pids())


def test_sigterm_to_the_guardian_ends_all(stubborn: Stubborn) -> None:
    with stubborn.start("--ignore-sigterm") as child:
        assert stubborn.settled()
        child._keeper.terminate()
        assert eventually(stubborn.gone), stubborn.left()
        assert child.stop() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("argv", "number"),
    [(["./nowhere"], errno.ENOENT), (["no-such-program"], errno.ENOENT), (["/etc/passwd"], errno.EACCES)],
)
def test_what_cannot_be_executed_says_why(tmp_path: Path, argv: list[str], number: int) -> None:
    before = own_children()
    with pytest.raises(OSError) as caught:
        Child.start(argv, env={"PATH": "/usr/bin"}, log=tmp_path / "log", cwd=tmp_path)
    assert (caught.value.errno, caught.value.filename) == (number, argv[0])
    assert own_children() == before


def test_a_missing_working_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not-there"):
        Child.start(["/bin/true"], env={}, log=tmp_path / "log", cwd=tmp_path / "not-there")


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not-there"):
        Child.start(["/bin/true"], env={}, log=tmp_path / "not-there" / "log")


def own_children() -> list[int]:
    """Returns this process's children, zombies included."""
    return [pid for pid, process in guardian.processes().items() if process.parent == os.getpid()]


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["ends", "is killed", "cannot start"])
def test_a_scratch_directory_goes_with_its_program(tmp_path: Path, how: str) -> None:
    inside = tmp_path / "tmp"
    inside.mkdir()
    script = 'mkdir "$TMPDIR/a"; touch "$TMPDIR/a/b"; ' + ("sleep 60" if how == "is killed" else "exit 0")
    argv = ["/no/such/program"] if how == "cannot start" else ["/bin/sh", "-c", script]
    env = {"TMPDIR": str(inside), "PATH": os.environ["PATH"]}
    with contextlib.suppress(OSError), Child.start(argv, env=env, log=tmp_path / "log", scratch=True) as child:
        assert child.scratch is not None
        assert child.scratch.parent == inside
        if how == "is killed":
            assert eventually((child.scratch / "a" / "b").exists)
        child.stop(0)
        assert not child.scratch.exists()
    assert eventually(lambda: not list(inside.iterdir()))


def test_the_owner_keeps_no_zombie_thread_or_descriptor(tmp_path: Path) -> None:
    children, fds, threads = own_children(), open_fds(), threading.active_count()
    for script in ("exit 0", "sleep 60", "kill -9 $$"):
        with run_sh(script, tmp_path) as child:
            child.wait(0.2)
    assert own_children() == children
    assert open_fds() == fds
    assert eventually(lambda: threading.active_count() == threads)


def test_the_log_starts_with_the_command_line_then_has_both_outputs(tmp_path: Path) -> None:
    script = "echo 'to stdout'; echo 'to stderr' >&2; pwd"
    with Child.start(["/bin/sh", "-c", script], env={}, log=tmp_path / "log", cwd=Path("/usr")) as child:
        assert child.wait(10) == 0
    lines = child.log.read_text().splitlines()
    assert shlex.split(lines[0]) == ["$", "/bin/sh", "-c", script]
    assert lines[1:] == ["to stdout", "to stderr", "/usr"]


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        with run_sh("echo once", tmp_path) as child:
            child.wait(10)
    assert child.log.read_text().splitlines().count("once") == 2


def test_the_environment_is_passed_whole_and_shown_nowhere(tmp_path: Path) -> None:
    secret = f"secret-{uuid.uuid4()}"
    big = "x" * 100_000
    script = 'test "$(printenv KEY)" = "$(cat expected)" && test ${#BIG} = 100000 && env | wc -l && exec sleep 60'
    (tmp_path / "expected").write_text(secret)
    env = {"KEY": secret, "BIG": big, "PATH": "/usr/bin:/bin"}
    log = tmp_path / "log"
    with Child.start(["sh", "-c", script], env=env, log=log, cwd=tmp_path) as child:
        assert eventually(lambda: len(log.read_text().splitlines()) == 2)
        assert int(log.read_text().splitlines()[1]) <= len(env) + 3  # sh adds PWD, SHLVL, _
        assert child.poll() is None
        everything = [argv for pid in guardian.all_pids() if (argv := cmdline(pid))]
        assert any(b"guardian.py" in argv for argv in everything)
        assert not any(secret.encode() in argv for argv in everything)
    assert secret not in log.read_text()


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_program_inherits_no_descriptor_and_default_signals(tmp_path: Path) -> None:
    with run_sh("ls /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status", tmp_path) as child:
        assert child.wait(10) == 0
    fds, *masks = child.log.read_text().splitlines()[1:]
    assert int(fds) == 4  # 0, 1, 2 and the folder that ls reads
    # The C library keeps signals 32 and 33 to itself: no program can reset them when its parent ignores them.
    assert [int(mask.split()[1], 16) & ~(0b11 << 31) for mask in masks] == [0, 0]


def test_a_line_protocol(tmp_path: Path) -> None:
    script = "import sys\nfor line in sys.stdin:\n print(line.strip()[::-1], flush=True)\nprint('bye', file=sys.stderr)"
    with Child.start([sys.executable, "-c", script], env={}, log=tmp_path / "log", pipes=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("grün\n")
        assert child.stdout.readline() == "nürg\n"
        child.stdin.close()
        assert child.stdout.read() == ""
        assert child.wait(10) == 0
    assert child.log.read_text().splitlines()[-1] == "bye"


def test_stop_ends_a_read_in_another_thread(tmp_path: Path) -> None:
    with Child.start(["/bin/cat"], env={}, log=tmp_path / "log", pipes=True) as child:
        assert child.stdout is not None
        read: list[str] = []
        reader = threading.Thread(target=read.extend, args=(child.stdout,))
        reader.start()
        child.stop(grace_s=5)
        reader.join(5)
        assert not reader.is_alive()
        assert read == []


def test_a_strangers_segment_survives(tmp_path: Path) -> None:
    with run_sh("exec sleep 60", tmp_path) as child:
        segment = SHM / f"psm_{uuid.uuid4().hex[:8]}"
        segment.touch()
        time.sleep(0.1)
        child.stop(grace_s=0)
        try:
            assert segment.exists()
            assert child.shm_removed == ()
        finally:
            segment.unlink(missing_ok=True)


def test_a_strangers_segment_survives_that_the_program_has_open(tmp_path: Path) -> None:
    name = SHM / f"psm_{uuid.uuid4().hex[:8]}"
    script = f"until test -e {name}; do sleep 0.01; done; exec 3< {name}; echo open; exec sleep 60"
    with run_sh(script, tmp_path, PATH="/usr/bin:/bin") as child:
        segment = shared_memory.SharedMemory(name.name, create=True, size=64)
        try:
            assert eventually(lambda: "open" in child.log.read_text().splitlines())
            time.sleep(0.2)
            child.stop(grace_s=0)
            assert name.exists()
            assert child.shm_removed == ()
        finally:
            segment.close()
            segment.unlink()


@pytest.mark.parametrize("held", ["fd", "map"])
def test_a_segment_is_ours_if_open_or_mapped(tmp_path: Path, held: str) -> None:
    """C libraries close a segment once it is mapped."""
    name = SHM / f"nccl-{uuid.uuid4().hex[:8]}"
    script = (
        "import mmap, os, sys, time\n"
        f"fd = os.open({str(name)!r}, os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(fd, 4096)\n"
        "if sys.argv[1] == 'map':\n"
        "  memory = mmap.mmap(fd, 4096, trackfd=False) if sys.version_info >= (3, 13) else mmap.mmap(fd, 4096)\n"
        "  os.closerange(3, 64)\n"
        "print('made', flush=True)\ntime.sleep(60)"
    )
    with Child.start([sys.executable, "-c", script, held], env={}, log=tmp_path / "log") as child:
        assert eventually(lambda: "made" in child.log.read_text().splitlines())
        time.sleep(0.2)
        child.stop(grace_s=0)
        left = name.exists()
        name.unlink(missing_ok=True)
        assert child.shm_removed == (name.name,)
        assert not left


def test_a_semaphores_segment_is_removed(tmp_path: Path) -> None:
    """The C library makes it under another name and links it: only the inode tells whose it is."""
    name = f"/varcas-{uuid.uuid4().hex[:8]}"
    script = (
        "import _multiprocessing, time\n"
        f"s = _multiprocessing.SemLock(0, 1, 1, {name!r}, False)\n"
        "print('made', flush=True)\ntime.sleep(60)"
    )
    log = tmp_path / "log"
    with Child.start([sys.executable, "-c", script], env={}, log=log) as child:
        assert eventually(lambda: "made" in log.read_text().splitlines())
        assert (SHM / f"sem.{name[1:]}").exists()
        child.stop(grace_s=0)
        assert child.shm_removed == (f"sem.{name[1:]}",)
        assert not (SHM / f"sem.{name[1:]}").exists()


def test_the_listener_is_ours_only_if_one_of_our_processes_holds_it(tmp_path: Path) -> None:
    port = free_port()
    assert not listener_is_ours(port, {os.getpid()})
    argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    with Child.start(argv, env={}, log=tmp_path / "log", cwd=tmp_path) as child:
        assert eventually(lambda: listener_is_ours(port, child.descendants()))
        assert not listener_is_ours(port, {os.getpid()})
        assert not listener_is_ours(port, set())
    assert not listener_is_ours(port, {child.pid})


def test_an_accepted_connection_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listener_is_ours(port, {os.getpid()})
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    with client, accepted:
        assert not listener_is_ours(port, {os.getpid()})


def test_the_guardian_is_quick(tmp_path: Path) -> None:
    times_s = []
    for _ in range(5):
        began_s = time.monotonic()
        with run_sh("exec sleep 60", tmp_path) as child:
            times_s.append(time.monotonic() - began_s)
            child.stop(grace_s=0)
    assert min(times_s) < 0.15
