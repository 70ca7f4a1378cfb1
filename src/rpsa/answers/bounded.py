"""Computer algebra with bounds: in a process of its own, which ends when a comparison takes too long.

No limit within a process holds: no signal interrupts a power tower that Python raises in one step, and outside of the
main thread there are none.
"""

import atexit
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress

from rpsa.errors import RPSAError

logger = logging.getLogger(__name__)

CPU_SECONDS = 5
"""For one comparison. The kernel counts them, so that a busy machine changes no verdict."""
_WALL_SECONDS = 300.0  # where the kernel does not count
_MEMORY = 4 << 30  # bytes of address space

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None
_owner = 0  # who started it: what is forked off starts its own


def algebra_says_equal(stated: str, gold: str) -> bool:
    """Whether two canonical answers are equal; a comparison that does not end is warned of, and says no.

    Raises:
        RPSAError: the process does not start.
    """
    with _lock:
        process = _process if _process is not None and _owner == os.getpid() else _start()
        reply = _ask(process, json.dumps([stated, gold]))
    if reply is None:
        logger.warning("%.80r and %.80r could not be compared: counted as different", stated, gold)
    return reply == "true"


def serve() -> None:
    """Compare the pairs that come in, one a line; what the process of `_start` does."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is a reply
    from rpsa.answers.algebra import equal

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # not everywhere can it be set
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, resource.RLIM_INFINITY)
        )
        try:
            same = equal(*json.loads(line))
        except Exception:  # of any kind, from three libraries: it could not be read or compared
            same = False
        print(json.dumps(same), file=replies, flush=True)


def _start() -> subprocess.Popen[str]:
    global _process, _owner
    program = f"import sys; sys.path[:] = {sys.path!r}; from rpsa.answers.bounded import serve; serve()"
    _process, _owner = (
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        ),
        os.getpid(),
    )
    if _ask(_process) != "ready":
        raise RPSAError(
            "mathematics cannot be compared: math-verify does not load; `import math_verify` says why"
        )
    return _process


def _ask(process: subprocess.Popen[str], question: str | None = None) -> str | None:
    """The next line that the process writes; None if it ended, or did not answer in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(_WALL_SECONDS, process.kill)
    late.start()
    reply = ""
    try:
        if question is not None:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        pass
    finally:  # an interrupt too: an answer that nobody read would be taken for the next one's
        late.cancel()
        if not reply:
            _stop()
    return reply.rstrip("\n") or None


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.wait()
    _process = None
