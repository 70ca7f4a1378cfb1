"""The first program in any sandbox: take the job from stdin, give up all privileges, run the job.

A job is a line with its length in bytes, then JSON:
    limits    fields of `Limits`
    uid       whom to become, if root
    path      folders to import packages from
    modules   [name, source] of sources in this folder, in the order of their imports
    run       the module of these whose `main(data, receive, send)` is called: what were stdin and stdout are now
              the descriptors receive and send. Or null: `data` is a program, run as `__main__`
    data      for what runs
"""

import json
import math
import os
import resource
import sys
import types
from typing import Any


def main() -> None:
    job = _receive_job()
    modules = {name: _module(name) for name, _ in job["modules"]}
    for name, source in job["modules"]:
        exec(compile(source, f"<{name}>", "exec"), modules[name].__dict__)
    sys.path += job["path"]
    _give_up_privileges(job["limits"], job["uid"])
    modules["rpsa.evaluation.sandbox.inside.seccomp"].forbid_system_calls()
    null = os.open(os.devnull, os.O_RDWR)
    if job["run"] is None:
        os.dup2(null, 0)
        os.close(null)
        program = types.ModuleType("__main__")
        sys.modules["__main__"] = program
        exec(compile(job["data"], "<program>", "exec"), program.__dict__)
        return
    receive, send = os.dup(0), os.dup(1)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    modules[job["run"]].main(job["data"], receive, send)


def _receive_job() -> dict[str, Any]:
    digits = b""
    while not digits.endswith(b"\n"):
        digits += os.read(0, 1) or sys.exit("no job came")
    text = bytearray()
    while len(text) < int(digits):
        text += os.read(0, int(digits) - len(text)) or sys.exit("the job was cut off")
    job: dict[str, Any] = json.loads(text)
    return job


def _module(name: str) -> Any:
    """A new empty module, in `sys.modules` with the packages it is said to be in."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        package.__path__ = []
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


def _give_up_privileges(limits: dict[str, Any], uid: int | None) -> None:
    if os.getuid() == 0 and uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    os.umask(0o077)
    for name, value in {
        "RLIMIT_AS": limits["memory_mb"] << 20,
        "RLIMIT_CPU": math.ceil(limits["seconds"]) + 1,
        "RLIMIT_FSIZE": limits["file_mb"] << 20,
        "RLIMIT_NPROC": limits["processes"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (bound, bound))


if __name__ == "__main__":
    main()
