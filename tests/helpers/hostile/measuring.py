"""Runs hostile programs against a sandbox and looks from outside whether they were stopped.

`PYTHONPATH=src:tests python tests/helpers/hostile/measuring.py` writes the table of docs/sandbox.md.
"""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from helpers.paths import ROOT
from rpsa.evaluation.sandbox import Limits, Sandbox, probe
from rpsa.evaluation.sandbox.running import Program, grade_programs
from rpsa.evaluation.sandbox.tiers import Bubblewrap, Container, Namespaces, Unsandboxed

SECONDS = 2.0
TIERS: tuple[Sandbox, ...] = (Bubblewrap(), Namespaces(), Container("docker"), Unsandboxed())


@dataclass(frozen=True)
class Hostile:
    """A program of attacks.txt or cheats.txt."""

    name: str
    code: str
    endings: frozenset[str]
    bounded: bool


def _read(name: str) -> tuple[Hostile, ...]:
    _, *parts = (Path(__file__).parent / name).read_text().split("=== ")
    found = []
    for part in parts:
        heading, _, code = part.partition("\n")
        title, *words = heading.split(" | ")
        endings = {word for word in " ".join(words).split() if word != "unbounded"}
        found.append(Hostile(title, code, frozenset(endings or {"exit"}), "unbounded" not in words))
    return tuple(found)


ATTACKS, CHEATS = _read("attacks.txt"), _read("cheats.txt")
_ATTACK_START = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def survive():
    sleep = "import time; time.sleep(30)"
    os.execv(sys.executable, ["python3", "-S", "-c", sleep, "{token}"])
"""
_CHEAT_START = """
import os
def shout(text):
    for n in range(16):
        try: os.write(n, text)
        except OSError: pass
class Yes:
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = __bool__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = lambda _: 0
"""
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
        survivors = [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._carries_token(pid)
        ]
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


def escapes(attack: Hostile, sandbox: Sandbox) -> list[str]:
    """How an attack got through; empty if it was stopped."""
    with outside() as world:
        code = _ATTACK_START + attack.code
        for name, value in world.places.items():
            code = code.replace(f"{{{name}}}", str(value))
        start = time.monotonic()
        finished = sandbox.run(code, Limits(seconds=SECONDS, processes=16))
        seconds = time.monotonic() - start
        time.sleep(0.1)  # for what is on its way to the host
        found = world.touched()
    if "ESCAPED" in finished.output:
        found.append(f"it said so: {finished.output.strip()[:200]}")
    if "SyntaxError" in finished.output or "NameError" in finished.output:
        found.append(f"the attack itself is broken: {finished.output[-200:]}")
    if finished.ending not in attack.endings:
        found.append(f"it ended by {finished.ending}: {finished.output[-200:]}")
    if seconds > SECONDS + 300:  # an hour's sleep is no timeout, a busy machine is no escape
        found.append(f"it took {seconds:.0f} s")
    return found


def measure(sandbox: Sandbox) -> dict[str, str]:
    """What became of each hostile program: "stopped", or how it got through; without those that do not run there."""
    attacks = [attack for attack in ATTACKS if sandbox.isolates or attack.bounded]
    cheats = [cheat for cheat in CHEATS if sandbox.isolates or cheat.bounded]
    os.environ["RPSA_TEST_SECRET"] = "1"
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda attack: "; ".join(escapes(attack, sandbox)), attacks)
        results = {attack.name: how or "stopped" for attack, how in zip(attacks, found, strict=True)}
    del os.environ["RPSA_TEST_SECRET"]
    programs = [
        Program(cheat.name, _CHEAT_START + cheat.code, TESTS, "add", seconds=SECONDS) for cheat in cheats
    ]
    # without walls, one cheat reaches into the tests of another
    for verdict in grade_programs(programs, sandbox, workers=4 if sandbox.isolates else 1):
        results[verdict.id] = "it passed" if verdict.passed else "stopped"
    return results


def table() -> str:
    """Markdown: what each tier that works here does to each program, measured now."""
    measured = {
        sandbox: measure(sandbox) for sandbox in TIERS if not sandbox.isolates or probe(sandbox) is None
    }

    def cell(sandbox: Sandbox, program: Hostile) -> str:
        result = measured.get(sandbox, {}).get(program.name, "not run")
        return result if result in ("stopped", "not run") else "**gets through**"

    lines = ["| program | " + " | ".join(sandbox.name for sandbox in TIERS) + " |", "|---" * 5 + "|"]
    for program in ATTACKS + CHEATS:
        lines.append(f"| {program.name} | " + " | ".join(cell(sandbox, program) for sandbox in TIERS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = ROOT / "docs" / "sandbox.md"
    before, start, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    page.write_text(before + start + table() + "\n" + end + after)
