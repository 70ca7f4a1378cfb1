"""Runs hostile programs against a sandbox and looks from outside whether they were stopped."""

import os
import platform
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hostile.programs import ATTACKS, CHEATS, Attack, Cheat
from rpsa.evaluation.sandbox import Limits, Sandbox, probe
from rpsa.evaluation.sandbox.grading import Program, Verdict, grade_programs
from rpsa.evaluation.sandbox.tiers import Bubblewrap, Container, Namespaces, Unsandboxed

SECONDS = 3.0
TIERS: tuple[Sandbox, ...] = (Bubblewrap(), Namespaces(), Container("docker"), Unsandboxed())
TESTS = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(0.5, 0.25) == 0.75
    assert candidate([1], [2]) == [1, 2]
    assert candidate(10**30, 1) == 10**30 + 1
    assert all(map(lambda n: candidate(n, n) == 2 * n, range(5)))
    assert [*map(candidate, [1, 2], [3, 4])] == [4, 6]
check(add)
"""
_CALLS = {
    "x86_64": {"clone": 56, "add_key": 248, "bpf": 321},
    "aarch64": {"clone": 220, "add_key": 217, "bpf": 280},
}


@dataclass
class Outside:
    """What the host holds that no program may reach; `touched` says what was."""

    folder: Path
    victim: subprocess.Popen[bytes]
    token: str = field(default_factory=lambda: f"rpsa{secrets.token_hex(8)}")
    visits: list[str] = field(default_factory=list)
    places: dict[str, object] = field(default_factory=dict)

    def touched(self) -> list[str]:
        found = list(self.visits)
        if sorted(path.name for path in self.folder.iterdir()) != ["secret", "socket"]:
            found.append("files outside were changed")
        if self.victim.poll() is not None:
            found.append("a process of the host was killed")
        survivors = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._carries_token(pid)]
        for pid in survivors:
            found.append("a process outlived its sandbox")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found

    def _carries_token(self, pid: int) -> bool:
        with suppress(OSError):
            return self.token.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False


@contextmanager
def outside() -> Iterator[Outside]:
    """A folder with a secret, servers on loopback and on Unix sockets, and a process, all of the host."""
    with (
        tempfile.TemporaryDirectory() as name,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as by_path,
        socket.socket(socket.AF_UNIX) as abstract,
        subprocess.Popen(["sleep", "60"]) as victim,
    ):
        world = Outside(Path(name), victim)
        (world.folder / "secret").write_text("the secret")
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        by_path.bind(f"{name}/socket")
        abstract.bind(f"\0{world.token}")
        world.places = {
            "secret": f"{name}/secret",
            "outside": name,
            "home": Path.home(),
            "port": port,
            "socket": f"{name}/socket",
            "abstract": world.token,
            "victim": victim.pid,
            "token": world.token,
            **_CALLS[platform.machine()],
        }
        closing = threading.Event()
        servers = [("TCP", tcp), ("a Unix socket", by_path), ("an abstract socket", abstract), ("UDP", udp)]
        threads = [threading.Thread(target=_serve, args=(world, *pair, closing)) for pair in servers]
        for thread in threads:
            thread.start()
        try:
            yield world
        finally:
            closing.set()
            for thread in threads:
                thread.join()
            victim.kill()


def _serve(world: Outside, name: str, server: socket.socket, closing: threading.Event) -> None:
    server.settimeout(0.05)
    if server.type == socket.SOCK_STREAM:
        server.listen()
    while not closing.is_set():
        with suppress(TimeoutError):
            if server.type == socket.SOCK_STREAM:
                server.accept()[0].close()
            else:
                server.recv(1)
            world.visits.append(f"{name} was reached")


def escapes(attack: Attack, sandbox: Sandbox) -> list[str]:
    """How an attack got through; empty if it was stopped."""
    with outside() as world:
        os.environ["RPSA_TEST_SECRET"] = "1"
        start = time.monotonic()
        try:
            finished = sandbox.run(attack.code.format(**world.places), Limits(seconds=SECONDS, processes=16))
        finally:
            del os.environ["RPSA_TEST_SECRET"]
        seconds = time.monotonic() - start
        time.sleep(0.1)  # for what is on its way to the host
        found = world.touched()
    if "ESCAPED" in finished.output:
        found.append(f"it said so: {finished.output.strip()[:200]}")
    if "SyntaxError" in finished.output or "NameError" in finished.output:
        found.append(f"the attack itself is broken: {finished.output[-200:]}")
    if finished.ending not in attack.endings:
        found.append(f"it ended by {finished.ending}: {finished.output[-200:]}")
    if seconds > SECONDS + 15:
        found.append(f"it took {seconds:.0f} s")
    return found


def cheat_program(cheat: Cheat) -> Program:
    return Program(cheat.name, cheat.code, TESTS, "add", seconds=SECONDS)


def cheat_verdicts(sandbox: Sandbox, cheats: tuple[Cheat, ...] = CHEATS) -> list[Verdict]:
    return grade_programs([cheat_program(cheat) for cheat in cheats], sandbox, workers=2)


def table() -> str:
    """A Markdown table: each hostile program by each tier; measured here, now."""
    tiers = [(sandbox, probe(sandbox) if sandbox.isolates else None) for sandbox in TIERS]
    lines = [
        "| program | " + " | ".join(sandbox.name for sandbox, _ in tiers) + " |",
        "|---" * (len(tiers) + 1) + "|",
    ]
    for attack in ATTACKS:
        cells = [
            "not run" if problem or not (sandbox.isolates or attack.bounded) else _word(not escapes(attack, sandbox))
            for sandbox, problem in tiers
        ]
        lines.append(f"| {attack.name} | " + " | ".join(cells) + " |")
    verdicts = {sandbox: cheat_verdicts(sandbox) for sandbox, problem in tiers if not problem}
    for i, cheat in enumerate(CHEATS):
        cells = [
            _word(not verdicts[sandbox][i].passed) if sandbox in verdicts else "not run" for sandbox, _ in tiers
        ]
        lines.append(f"| solution {cheat.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _word(stopped: bool) -> str:
    return "stopped" if stopped else "**not stopped**"
