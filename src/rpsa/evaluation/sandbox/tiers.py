"""The sandboxes, strongest first, and which of them work here.

Order: bubblewrap, namespaces, container, none. Bubblewrap and our namespaces show a program the Python runtime
and nothing else, and need no privileged service; bubblewrap comes first because many have read it. A container
shows a whole image, and its engine often runs as root. None is resource limits alone, and must be asked for.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import ClassVar

from rpsa.evaluation.sandbox.limits import Finished, Limits
from rpsa.evaluation.sandbox.process import Launch, Process, exchange, job_text, source
from rpsa.evaluation.sandbox.runtime import (
    ENVIRONMENT,
    PACKAGES_FOLDER,
    PYTHON,
    PYTHON_FLAGS,
    package_paths,
    view,
)


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
    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Launch:
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

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Launch:
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
        return Launch(
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

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Launch:
        uid = _nobody()
        config = {
            **asdict(view(packages)),
            "scratch_mb": limits.scratch_mb,
            "uid": uid,
            "command": [PYTHON, *PYTHON_FLAGS, "-c", source("entry")],
            "environment": ENVIRONMENT,
        }
        command = [sys.executable, "-I", "-S", "-B", "-c", source("namespaces"), json.dumps(config)]
        return Launch(command, {}, uid=uid, path=(PACKAGES_FOLDER,))


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

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Launch:
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

        return Launch([*command, "-s", "-P", "-B", "-c", source("entry")], dict(os.environ), clean_up=remove)


class Unsandboxed(Sandbox):
    """Resource limits and a system call filter, no walls: a program reads what you can read."""

    name = "unsandboxed"
    isolates = False

    @property
    def version(self) -> str:
        return "(resource limits only)"

    def launch(self, limits: Limits, packages: tuple[str, ...]) -> Launch:
        folder = tempfile.mkdtemp(prefix="rpsa-")
        here = {"HOME": folder, "TMPDIR": folder}
        path = tuple(sorted({os.path.dirname(path) for path in package_paths(packages)}))
        return Launch(
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
