"""Sandbox tiers, strongest first, and which of them work here: each is tried by a program that tries the walls.

Order: bubblewrap, namespaces, container, none. Bubblewrap and our namespaces show a program the Python runtime
and nothing else, and need no privileged service; bubblewrap comes first because many have read it. A container
shows a whole image, and its engine often runs as root. None is resource limits alone, and must be asked for.

Of the host a program sees this Python, its standard library, shared libraries and chosen packages (`View`). Python is
shown under /python wherever it is installed, so that no home folder's path is to be seen.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import ClassVar

from rpsa.errors import RPSAError
from rpsa.evaluation.sandbox.process import Finished, Invocation, Limits, Process, exchange, job_text, source

PYTHON = "/python/bin/python3"
PYTHON_FLAGS = ("-s", "-S", "-P", "-B")
PACKAGES_FOLDER = "/packages"
ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "LD_LIBRARY_PATH": "/python/lib",
    # the same order of sets, and so the same verdict, in every run
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@dataclass(frozen=True)
class View:
    """`show`: (real path on the host, path inside), read-only; `links`: (text of a symbolic link, path inside)."""

    show: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]


@cache
def view(packages: tuple[str, ...]) -> View:
    """What to show so that Python runs and imports `packages` (names of distributions)."""
    base = os.path.realpath(sys.base_prefix)
    show = [(os.path.realpath(sys._base_executable), PYTHON)]  # type: ignore[attr-defined]
    links = []
    for name in sorted({"lib", sys.platlibdir}):
        if os.path.isdir(f"{base}/{name}"):
            show.append((os.path.realpath(f"{base}/{name}"), f"/python/{name}"))
    for folder in _LIBRARY_FOLDERS:
        if os.path.islink(folder):
            links.append((os.readlink(folder), folder))
        elif os.path.isdir(folder):
            show.append((folder, folder))
    show += [(path, f"{PACKAGES_FOLDER}/{os.path.basename(path)}") for path in package_paths(packages)]
    return View(tuple(show), tuple(links))


def package_paths(packages: tuple[str, ...]) -> list[str]:
    """The files and folders of `packages` at the top of site-packages. Raises RPSAError if one is not there."""
    found = set()
    for name in packages:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise RPSAError(
                f"package {name!r} is to be shown to programs but is not installed: pip install {name}"
            ) from None
        tops = {file.parts[0] for file in package.files or ()} - {".."}
        found |= {os.path.realpath(str(package.locate_file(top))) for top in tops}
    return sorted(path for path in found if os.path.exists(path))


@dataclass(frozen=True)
class Sandbox(ABC):
    """One way to run code. Equal ones behave alike; `str()` gives name and version, for records."""

    name: ClassVar[str] = ""
    isolates: ClassVar[bool] = True
    """False for the tier that only limits resources."""

    program: ClassVar[str | None] = None
    """What must be installed for it."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Invocation:
        """How to start `entry` in a new sandbox that can import `packages` (names of distributions).

        Raises:
            RPSAError: a package is not installed.
        """

    def run(self, program: str, limits: Limits | None = None, packages: Sequence[str] = ()) -> Finished:
        """Run a Python program as `__main__`, with no input, in a sandbox of its own, and end all it started."""
        limits = limits or Limits()
        launch = self.launch(limits, tuple(packages))
        with Process(launch, subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT) as process:
            job = job_text(launch, limits, None, program)
            stdin = os.dup(process.stdin.fileno())
            process.stdin.close()
            heard = exchange([(stdin, job)], process.output.fileno(), limits)
            ending, code = heard.ending, None
            if ending == "exit":  # of its output: the program itself may go on
                if process.has_ended(max(1.0, limits.seconds - heard.seconds)):
                    code = process.end()
                else:
                    ending = "timeout"
        return Finished(ending, code, heard.output.decode(errors="replace"), heard.seconds, str(self))


class Bubblewrap(Sandbox):
    """bwrap: mount, process, network, IPC, host name and user namespaces, built by a program of others."""

    name = "bubblewrap"
    program = "bwrap"

    @property
    def version(self) -> str:
        return _version("bwrap")

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Invocation:
        seen = view(packages)
        command = [
            shutil.which("bwrap") or "bwrap",
            "--die-with-parent",
            "--new-session",
            "--hostname",
            "sandbox",
        ]
        command += [f"--unshare-{name}" for name in ("pid", "net", "ipc", "uts", "cgroup-try")]
        if os.geteuid() == 0:
            # root needs no user namespace; `entry` becomes somebody to whom process limits apply
            command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        folders = {"/dev", "/python"} | {os.path.dirname(there) for _, there in (*seen.show, *seen.links)} - {
            "/"
        }
        for folder in sorted(folders):  # left to itself, bwrap makes them for their owner alone
            command += ["--perms", "0755", "--dir", folder]
        for here, there in seen.show:
            command += ["--ro-bind", here, there]
        for text, there in seen.links:
            command += ["--symlink", text, there]
        for device in ("null", "zero", "random", "urandom"):
            command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        command += ["--perms", "1777", "--size", str(limits.scratch_mb << 20), "--tmpfs", "/tmp"]
        command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
        return Invocation(
            [*command, PYTHON, *PYTHON_FLAGS, "-c", source("entry")],
            ENVIRONMENT,
            uid=_nobody(),
            path=(PACKAGES_FOLDER,),
        )


class Namespaces(Sandbox):
    """The same out of the kernel alone: `inside/namespaces.py`. Linux 5.12 or newer, x86_64 or aarch64."""

    name = "namespaces"

    @property
    def version(self) -> str:
        return f"linux {os.uname().release}"

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Invocation:
        uid = _nobody()
        config = {
            **asdict(view(packages)),
            "scratch_mb": limits.scratch_mb,
            "uid": uid,
            "command": [PYTHON, *PYTHON_FLAGS, "-c", source("entry")],
            "environment": ENVIRONMENT,
        }
        command = [sys.executable, "-I", "-S", "-B", "-c", source("namespaces"), json.dumps(config)]
        return Invocation(command, {}, uid=uid, path=(PACKAGES_FOLDER,))


@dataclass(frozen=True)
class Container(Sandbox):
    """docker or podman with an image that must be there already: nothing is ever pulled.

    The image needs Python as `python3`, and the packages that the tests import (numpy for HumanEval+).
    """

    engine: str = "docker"
    image: str = "python:3.11-slim"

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.engine

    @property
    def program(self) -> str:  # type: ignore[override]
        return self.engine

    @property
    def version(self) -> str:
        return f"{_version(self.engine)}, {self.image}"

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Invocation:
        name = f"rpsa-{secrets.token_hex(8)}"
        engine = shutil.which(self.engine) or self.engine
        memory = f"{limits.memory_mb + limits.scratch_mb}m"
        user = f"{_nobody()}:65534"
        command = [engine, "run", "--rm", "--interactive", "--pull", "never", "--name", name]
        command += ["--network", "none", "--ipc", "none", "--read-only", "--cap-drop", "ALL"]
        command += ["--security-opt", "no-new-privileges", "--user", user]
        command += ["--memory", memory, "--memory-swap", memory, "--pids-limit", str(limits.processes)]
        command += [
            "--tmpfs",
            f"/tmp:rw,nosuid,nodev,noexec,size={limits.scratch_mb}m,nr_inodes=4096,mode=1777",
        ]
        for key, value in ENVIRONMENT.items():
            command += ["--env", f"{key}={value}"]
        command += ["--workdir", "/tmp", "--entrypoint", "python3", self.image]

        def remove() -> None:  # killing the client leaves the container running
            with suppress(subprocess.TimeoutExpired):
                subprocess.run([engine, "rm", "--force", name], capture_output=True, timeout=60, check=False)

        return Invocation(
            [*command, "-s", "-P", "-B", "-c", source("entry")], dict(os.environ), clean_up=remove
        )


class Unsandboxed(Sandbox):
    """Resource limits and a system call filter, no walls: a program reads what you can read."""

    name = "unsandboxed"
    isolates = False

    @property
    def version(self) -> str:
        return "(resource limits only)"

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Invocation:
        folder = tempfile.mkdtemp(prefix="rpsa-")
        here = {"HOME": folder, "TMPDIR": folder}
        path = tuple(sorted({os.path.dirname(path) for path in package_paths(packages)}))
        return Invocation(
            [sys.executable, *PYTHON_FLAGS, "-c", source("entry")],
            ENVIRONMENT | here,
            folder,
            path=path,
            clean_up=lambda: shutil.rmtree(folder, ignore_errors=True),
        )


def _nobody() -> int:
    """A user id that no account has (systemd's dynamic range), another in each sandbox."""
    return 61184 + secrets.randbelow(4096)


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(r"\d+(?:\.\d+)+", done.stdout)
    return found[0] if found else "unknown"


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
