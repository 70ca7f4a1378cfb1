"""Which sandboxes work on this machine: each is tried by running a program in it that tries the walls."""

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox.limits import Limits
from rpsa.evaluation.sandbox.tiers import Bubblewrap, Container, Namespaces, Sandbox, Unsandboxed

TIERS: tuple[Sandbox, ...] = (Bubblewrap(), Namespaces(), Container("docker"), Container("podman"))
"""Strongest first."""

_PROBE = """
import os, socket, sys, time
faults = []
if os.path.exists({canary!r}):
    faults.append("it sees the host's files")
if "RPSA_PROBE" in os.environ:
    faults.append("it sees the host's environment")
if os.getuid() == 0:
    faults.append("it runs programs as root")
try:
    open("/written", "w")
    faults.append("it lets programs write outside of their folder")
except OSError:
    pass
try:
    open("written", "w").write("x")
except OSError as error:
    faults.append(f"programs cannot write in their folder ({{error}})")
try:
    socket.create_connection(("127.0.0.1", {port}), 1)
    faults.append("it lets programs reach the network")
except OSError:
    pass
children = 0
try:
    for _ in range({processes} + 8):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
except OSError:
    pass
if children >= {processes} + 8:
    faults.append("it does not limit the number of processes")
print("; ".join(faults) or "sound")
sys.stdout.flush()
"""


@dataclass(frozen=True)
class TierReport:
    """Whether a tier works here, and why not."""

    sandbox: Sandbox
    problem: str | None

    def __str__(self) -> str:
        return f"{self.sandbox}: {self.problem or 'works'}"


@cache
def probe(sandbox: Sandbox) -> str | None:
    """Why this sandbox cannot be trusted here; None if it held. The answer is kept for the process's life."""
    if sandbox.program and shutil.which(sandbox.program) is None:
        return f"{sandbox.program} is not installed"
    handle, canary = tempfile.mkstemp(prefix="rpsa-canary-")
    os.close(handle)
    os.environ["RPSA_PROBE"] = "1"
    limits = Limits(seconds=10, processes=8)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            program = _PROBE.format(canary=canary, port=port, processes=limits.processes)
            finished = sandbox.run(program, limits)
    finally:
        del os.environ["RPSA_PROBE"]
        os.unlink(canary)
    said = finished.output.strip()
    if said == "sound":
        # children that the program left hold its output open, and are to end with it
        return None if finished.exit_code == 0 else "processes outlive the program that started them"
    if not said:
        return f"its probe ended with {finished.ending} and said nothing"
    lines = said.splitlines()
    return lines[-1 if lines[0].startswith("Traceback") else 0][:200]


def tier_reports(tiers: Sequence[Sandbox] = TIERS) -> list[TierReport]:
    """Every tier with what its probe found, strongest first: what `rpsa evaluate` prints about this machine."""
    return [TierReport(sandbox, probe(sandbox)) for sandbox in tiers]


def best_sandbox(accept_unsandboxed: bool = False, tiers: Sequence[Sandbox] = TIERS) -> Sandbox:
    """The strongest sandbox that works here; resource limits alone if none does and that is accepted.

    Raises:
        RPSAError: none works, and running code without one was not accepted.
    """
    found = next((sandbox for sandbox in tiers if probe(sandbox) is None), None)
    if found is not None:
        return found
    if accept_unsandboxed:
        return Unsandboxed()
    reasons = "; ".join(f"{sandbox.name}: {probe(sandbox)}" for sandbox in tiers)
    raise RPSAError(
        "no sandbox works here, so model-written code is not run: install bubblewrap (apt install bubblewrap), "
        f"allow user namespaces, or pass accept_unsandboxed=True ({reasons})"
    )
