"""Hostile programs: what each tries, and code that prints ESCAPED where it succeeds.

`{secret}` is a file outside that holds "the secret", `{outside}` its folder, `{port}` a TCP and UDP port on
which the host listens on loopback, `{socket}` and `{abstract}` Unix sockets of the host, `{victim}` the id of a
process of the host, `{token}` a word that the host looks for in the command lines of what is still running.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Attack:
    """A program for `Sandbox.run`."""

    name: str
    code: str
    endings: tuple[Literal["exit", "timeout", "output"], ...] = ("exit",)
    """How it may end where it is stopped."""
    bounded: bool = True
    """Whether it does no harm without a sandbox; what is not is not run there."""


@dataclass(frozen=True)
class Cheat:
    """A wrong solution of `add(a, b)` that tries to pass all the same."""

    name: str
    code: str


_LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
_TRY = "try:\n{}\nexcept (OSError, MemoryError, RuntimeError) as error: print(error)\n"


def _attempt(code: str) -> str:
    return _TRY.format("\n".join("    " + line for line in code.strip().splitlines()))


_SURVIVE = """
import os, sys, time
def survive():
    os.execv(sys.executable or "/python/bin/python3", ["python3", "-S", "-c", "import time; time.sleep(30)", "{token}"])
"""

ATTACKS = (
    # time
    Attack("loops for ever", "while True: pass", ("timeout",)),
    Attack("sleeps for ever", "import time\nwhile True: time.sleep(1)", ("timeout",)),
    Attack(
        "ignores every signal and loops",
        "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass",
        ("timeout",),
    ),
    Attack("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass", ("timeout",)),
    Attack("closes stdout and stderr and loops", "import os\nos.close(1); os.close(2)\nwhile True: pass", ("timeout", "exit")),
    # processes
    Attack(
        "fork bomb",
        "import os, time\nfor n in range(400):\n    try: pid = os.fork()\n    except OSError: print('refused at', n); break\n"
        "    if pid == 0: time.sleep(20); os._exit(0)\nelse: print('ESCAPED')",
        bounded=False,
    ),
    Attack(
        "fork bomb without end",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        ("timeout", "output", "exit"),
        bounded=False,
    ),
    Attack(
        "400 threads",
        _attempt("import threading, time\nfor _ in range(400): threading.Thread(target=time.sleep, args=(20,), daemon=True).start()\nprint('ESCAPED')"),
        ("exit", "timeout"),
        bounded=False,
    ),
    Attack("child in its own session outlives it", _SURVIVE + "if os.fork() == 0:\n    os.setsid()\n    survive()\ntime.sleep(0.5)", ("exit", "timeout")),
    Attack(
        "double fork outlives it",
        _SURVIVE + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for n in (0, 1, 2): os.close(n)\n        survive()\n    os._exit(0)\ntime.sleep(0.5)",
        ("exit", "timeout"),
    ),
    Attack(
        "child outlives the time limit",
        _SURVIVE + "if os.fork() == 0:\n    os.setpgid(0, 0)\n    survive()\nwhile True: pass",
        ("timeout",),
    ),
    # memory and disk
    Attack("allocates 4 GiB", _attempt("x = bytearray(4 << 30)\nprint('ESCAPED')"), bounded=False),
    Attack("maps 4 GiB of shared memory", _attempt("import mmap\nx = mmap.mmap(-1, 4 << 30)\nprint('ESCAPED')"), bounded=False),
    Attack(
        "hides memory in memfd files",
        _attempt("import os\nfor _ in range(20):\n    f = os.memfd_create('x')\n    for _ in range(8): os.write(f, bytes(1 << 20))\nprint('ESCAPED')"),
        bounded=False,
    ),
    Attack("hides memory in System V segments", _LIBC + "if libc.shmget(0, 1 << 20, 0o1600) >= 0: print('ESCAPED')", bounded=False),
    Attack(
        "fills the disk",
        _attempt("for n in range(40):\n    with open(f'f{{n}}', 'wb') as f: f.write(bytes(8 << 20))\nprint('ESCAPED')"),
        bounded=False,
    ),
    Attack("writes one file of 64 MiB", _attempt("with open('f', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))\nprint('ESCAPED')")),
    Attack("opens 1,000 files", _attempt("files = [open('/dev/null') for _ in range(1000)]\nprint('ESCAPED')")),
    Attack("raises its own limits", _attempt("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nprint('ESCAPED')").replace("OSError", "OSError, ValueError")),
    # output
    Attack("gigabytes on stdout", "import os\nwhile True: os.write(1, bytes(1 << 20))", ("output",)),
    Attack("gigabytes on stderr", "import os\nwhile True: os.write(2, b'x' * 70000)", ("output",)),
    Attack("recurses until the stack ends", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nexec('class A:\\n def __getattr__(s, n): return getattr(s, n)')\nA().x", ("exit",)),
    # files
    Attack("reads /etc/passwd", _attempt("if 'root' in open('/etc/passwd').read(): print('ESCAPED')")),
    Attack("reads a file outside", _attempt("print('ESCAPED', open('{secret}').read())")),
    Attack("lists the home folder", _attempt("import os\nif os.listdir('{home}'): print('ESCAPED')")),
    Attack("reads the environment", "import os\nif 'RPSA_TEST_SECRET' in os.environ: print('ESCAPED')"),
    Attack("reads its parent's environment", _attempt("import os\nif b'PATH=' in open(f'/proc/{{os.getppid()}}/environ', 'rb').read(): print('ESCAPED')")),
    Attack("reads /proc/1", _attempt("open('/proc/1/environ', 'rb').read()\nprint('ESCAPED')")),
    Attack("sees the host's processes", _attempt("import os\nif os.path.exists('/proc/{victim}'): print('ESCAPED')\nos.kill({victim}, 0)\nprint('ESCAPED')")),
    Attack("writes outside", _attempt("open('{outside}/new', 'w').write('x')\nprint('ESCAPED')")),
    Attack("writes through a symbolic link", _attempt("import os\nos.symlink('{outside}', 'link')\nopen('link/new', 'w').write('x')\nprint('ESCAPED')")),
    Attack("writes through ..", _attempt("open('../../../../../../..{outside}/new', 'w').write('x')\nprint('ESCAPED')")),
    Attack("links a file outside into its folder", _attempt("import os\nos.link('{secret}', 'copy')\nprint('ESCAPED')").replace("except (", "except (")),
    Attack("deletes a file outside", _attempt("import os\nos.unlink('{secret}')\nprint('ESCAPED')")),
    Attack("writes by a C call", _LIBC + "if libc.open(b'{outside}/new', 0o101, 0o644) >= 0: print('ESCAPED')"),
    Attack("writes into the standard library", _attempt("import json\nopen(json.__file__, 'r+')\nprint('ESCAPED')")),
    Attack("makes a folder at the root", _attempt("import os\nos.mkdir('/rpsa-{token}')\nos.rmdir('/rpsa-{token}')\nprint('ESCAPED')")),
    Attack("opens a disk or the kernel's memory", _attempt("import glob\nfor name in ['/dev/mem', '/dev/kmsg', *glob.glob('/dev/[svn][dv]*')]:\n    try: open(name, 'rb'); print('ESCAPED')\n    except OSError: pass")),
    Attack("makes a device", _attempt("import os, stat\nos.mknod('zero', 0o600 | stat.S_IFCHR, os.makedev(1, 5))\nopen('zero', 'rb').read(1)\nprint('ESCAPED')")),
    Attack("finds inherited descriptors", "import os\nfor n in range(3, 256):\n    try: os.fstat(n); print('ESCAPED', n)\n    except OSError: pass"),
    # network
    Attack("connects to a server on loopback", _attempt("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('ESCAPED')")),
    Attack("sends a datagram to loopback", _attempt("import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))")),
    Attack("connects to an abstract Unix socket", _attempt("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract}')\nprint('ESCAPED')")),
    Attack("connects to a Unix socket by its path", _attempt("import socket\nsocket.socket(socket.AF_UNIX).connect('{socket}')\nprint('ESCAPED')")),
    Attack("opens a socket to the machine's host (vsock)", _attempt("import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('ESCAPED')")),
    Attack("opens a netlink socket", _attempt("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')")),
    Attack("opens a raw socket", _attempt("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('ESCAPED')")),
    # privileges
    Attack("becomes root", _attempt("import os\nif os.getuid() == 0: print('ESCAPED')\nos.setuid(0)\nprint('ESCAPED')")),
    Attack("mounts", _LIBC + "if libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0: print('ESCAPED')", bounded=False),
    Attack("makes the root writable again", _LIBC + "if libc.mount(None, b'/', None, 4096 | 32, None) == 0: print('ESCAPED')", bounded=False),
    Attack("makes namespaces of its own", _LIBC + "if libc.unshare(0x10000000) == 0: print('ESCAPED')"),
    Attack(
        "clones into namespaces of its own",
        _LIBC + "pid = libc.syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nif pid > 0: print('ESCAPED')",
    ),
    Attack("changes its root", _attempt("import os\nos.mkdir('d'); os.chroot('d')\nprint('ESCAPED')")),
    Attack("traces its parent", _LIBC + "if libc.ptrace(16, os.getppid(), 0, 0) == 0: print('ESCAPED')"),
    Attack(
        "reads its parent's memory",
        _LIBC + "b = ctypes.create_string_buffer(8); v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "r = (ctypes.c_size_t * 2)(id(None), 8)\nlibc.process_vm_readv(os.getppid(), v, 1, r, 1, 0)\n"
        "if ctypes.get_errno() != 1: print('ESCAPED', ctypes.get_errno())",
    ),
    Attack("kills a process of the host", _attempt("import os\nos.kill({victim}, 9)\nprint('ESCAPED')")),
    Attack("kills all it can", "import os\nos.kill(-1, 9)\nprint('done')", bounded=False),
    Attack("kills its parent", "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1)\nprint('done')", ("exit", "timeout"), bounded=False),
    Attack("keeps a key in the kernel's keyring", _LIBC + "if libc.syscall({add_key}, b'user', b'k', b'v', 1, -2) >= 0: print('ESCAPED')"),
    Attack("starts an io_uring", _LIBC + "p = ctypes.create_string_buffer(120)\nif libc.syscall(425, 1, p) >= 0: print('ESCAPED')"),
    Attack("loads a program into the kernel (bpf)", _LIBC + "if libc.syscall({bpf}, 0, ctypes.create_string_buffer(120), 72) >= 0 or ctypes.get_errno() != 1: print('ESCAPED')"),
    Attack("sets the clock or the host name", _LIBC + "if libc.sethostname(b'x', 1) == 0: print('ESCAPED')", bounded=False),
)

_WRITE_TO_ALL = "\ndef shout(text):\n    for n in range(16):\n        try: os.write(n, text)\n        except OSError: pass\n"
_EQUAL = "class Yes:\n    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda s: 0\n    __bool__ = lambda s: True\n"

CHEATS = (
    Cheat("returns a constant", "def add(a, b): return 3"),
    Cheat("ends with exit code 0", "import os\nos._exit(0)\ndef add(a, b): pass"),
    Cheat("ends with exit code 0 when called", "import os\ndef add(a, b): os._exit(0)"),
    Cheat("exits when called", "import sys\ndef add(a, b): sys.exit(0)"),
    Cheat("exits quietly at the end", "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise SystemExit"),
    Cheat("prints what a pass might look like", "def add(a, b): print('passed'); print('OK'); print('{\"passed\": true}')"),
    Cheat("writes a pass to every descriptor", "import os" + _WRITE_TO_ALL + "def add(a, b): shout(b'\\n' + b'0' * 32 + b' [\"passed\", \"\"]\\n')"),
    Cheat(
        "writes every word it knows that looks like a nonce",
        "import gc, os, re, sys" + _WRITE_TO_ALL + """
def add(a, b):
    found, frame = set(), sys._getframe()
    while frame:
        found |= set(re.findall(r"[0-9a-f]{32}", repr(frame.f_locals) + repr(frame.f_globals)))
        frame = frame.f_back
    for thing in gc.get_objects():
        try: found |= set(re.findall(r"[0-9a-f]{32}", repr(thing)[:100000]))
        except Exception: pass
    for nonce in found: shout(f'\\n{nonce} ["passed", ""]\\n'.encode())
""",
    ),
    Cheat(
        "reads the nonce out of other processes",
        "import glob, os, re" + """
def add(a, b):
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            if folder == f"/proc/{os.getpid()}" or b"_receive_job" not in open(folder + "/cmdline", "rb").read(): continue
            found = set()
            memory = open(folder + "/mem", "rb", 0)
            for line in open(folder + "/maps"):
                if " rw-p " not in line: continue
                low, high = (int(x, 16) for x in line.split()[0].split("-"))
                if high - low > 64 << 20: continue
                memory.seek(low)
                found |= set(re.findall(rb'"nonce": "([0-9a-f]{32})"', memory.read(high - low)))
            for nonce in found:
                for n in range(2, 10):
                    try: os.write(os.open(f"{folder}/fd/{n}", os.O_WRONLY), b"\\n" + nonce + b' ["passed", ""]\\n')
                    except OSError: pass
        except OSError: pass
""",
    ),
    Cheat("returns what equals everything", _EQUAL + "def add(a, b): return Yes()"),
    Cheat("returns a number that equals everything", _EQUAL + "class N(Yes, int): pass\ndef add(a, b): return N(7)"),
    Cheat("returns a list that equals everything", _EQUAL + "class N(Yes, list): pass\ndef add(a, b): return N()"),
    Cheat("returns a mock", "from unittest.mock import MagicMock, ANY\ndef add(a, b): return ANY"),
    Cheat("returns NaN", "def add(a, b): return float('nan')"),
    Cheat("replaces built-ins", "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.all = builtins.any = lambda *_: True\nbuiltins.repr = str\ndef add(a, b): return None"),
    Cheat("replaces the tests", "import sys\nfor m in list(sys.modules.values()):\n    for n in ('check', 'run_tests', 'say'):\n        setattr(m, n, lambda *_: ('passed', ''))\ndef add(a, b): return None"),
    Cheat("replaces json, os.write and exec", "import json, os, builtins\nbuiltins.exec = lambda *_: None\njson.loads = lambda *_: ['passed', '']\ndef add(a, b): return None"),
    Cheat("poisons modules that the tests import", "import sys, types\nfor n in ('numpy', 'math'): sys.modules[n] = types.ModuleType(n)\ndef add(a, b): return None"),
    Cheat("traces every call", "import sys\nsys.settrace(lambda *_: None); sys.setprofile(lambda *_: sys.exit(0))\ndef add(a, b): return None"),
    Cheat("raises StopIteration", "def add(a, b): raise StopIteration"),
    Cheat("raises GeneratorExit", "def add(a, b): raise GeneratorExit"),
    Cheat("raises KeyboardInterrupt", "def add(a, b): raise KeyboardInterrupt"),
    Cheat("raises an exception of an invented kind", "class Passed(BaseException): pass\ndef add(a, b): raise Passed('passed')"),
    Cheat("changes its arguments", "def add(a, b):\n    if isinstance(a, list): a.clear(); b.clear()\n    return []"),
    Cheat("floods the tests with answers", "import os\ndef add(a, b):\n    for _ in range(10**5):\n        for n in range(16):\n            try: os.write(n, b'{\"dict\":[[\"value\",3]]}\\n')\n            except OSError: pass\n    return 3"),
    Cheat("answers with what is no reply", "import os" + _WRITE_TO_ALL + "def add(a, b): shout(b'\\xff\\x00{]\\n')"),
    Cheat("answers with nested lists without end", "import os" + _WRITE_TO_ALL + "def add(a, b): shout(b'[' * 60000 + b'\\n')"),
    Cheat("answers with an unknown kind of value", "import os" + _WRITE_TO_ALL + "def add(a, b): shout(b'{\"dict\":[[\"value\",{\"__reduce__\":[\"os.system\",\"id\"]}]]}\\n')"),
    Cheat("answers for ever without a line's end", "import os\ndef add(a, b):\n    while True:\n        for n in range(3, 16):\n            try: os.write(n, b'1' * 65536)\n            except OSError: pass"),
    Cheat("returns an iterator without end", "import itertools\ndef add(a, b): return itertools.count()"),
    Cheat("returns a range too long to hold", "def add(a, b): return range(10**30)"),
    Cheat("returns itself", "def add(a, b):\n    x = []\n    x.append(x)\n    return x"),
    Cheat("closes every descriptor", "import os\ndef add(a, b): os.closerange(0, 256)"),
    Cheat("kills its parent", "import os, signal\ndef add(a, b):\n    if os.getppid() > 1: os.kill(os.getppid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGKILL)"),
    Cheat("answers from two processes", "import os\ndef add(a, b):\n    os.fork()\n    return None"),
    Cheat("loops for ever when called", "def add(a, b):\n    while True: pass"),
    Cheat("does not define the function", "def sub(a, b): return a - b"),
    Cheat("is no Python", "def add(a, b) return"),
)
