"""Builds a sandbox out of Linux namespaces, with no tool but the kernel: run on the host, it ends in the sandbox.

New mount, process, network, IPC, host name and cgroup namespaces; as an ordinary user also a user namespace, as
root none, since root can become somebody else without. The new root is an empty tmpfs that shows what
`show` lists, read-only, a few devices and a scratch tmpfs; there is no /proc. The first process of the sandbox
waits for the program and takes all others with it when it ends.

argv[1] is JSON: `show` ([path here, path there]), `links` ([text, path there]), `scratch_mb`, `uid` (inside),
`command`, `environment`.
"""

import ctypes
import errno
import json
import os
import signal
import sys
from typing import Any

_NEW_USER = 0x10000000
# mount, cgroup, uts, ipc, pid, network
_NEW_OTHERS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_PDEATHSIG, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 24, 38
_HOST = "/.host"

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    config = json.loads(sys.argv[1])
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    uid, gid = os.geteuid(), os.getegid()
    own_user_namespace = uid != 0 or not _unshare(_NEW_OTHERS)
    if own_user_namespace:
        if not _unshare(_NEW_OTHERS | _NEW_USER):
            raise OSError(errno.EPERM, "the kernel gives no namespaces to this user")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{config['uid']} {uid} 1")
        _write("/proc/self/gid_map", f"{config['uid']} {gid} 1")
    first = os.fork()
    if first:
        for descriptor in (0, 1, 2):  # whoever reads from the program is to see its end
            os.close(descriptor)
        os._exit(_status(os.waitpid(first, 0)[1]))
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _build_root(config)
    _drop_privileges(None if own_user_namespace else config["uid"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the first process of a namespace never receives
    program = os.fork()
    if program == 0:
        os.setsid()
        os.chdir("/tmp")
        os.execve(config["command"][0], config["command"], config["environment"])
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_status(status))


def _build_root(config: dict[str, Any]) -> None:
    _mount("none", "/", "", _PRIVATE | _RECURSIVE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1024,mode=755")
    os.mkdir("/tmp" + _HOST)
    _pivot_root("/tmp", "/tmp" + _HOST)
    os.chdir("/")
    for here, there in config["show"]:
        _show(here, there, _READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for device in ("null", "zero", "random", "urandom"):
        _show(f"/dev/{device}", f"/dev/{device}", _ATTR_NOSUID | _ATTR_NOEXEC)
    for text, there in config["links"]:
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.symlink(text, there)
    os.makedirs("/tmp", exist_ok=True)
    limits = f"size={config['scratch_mb']}m,nr_inodes=4096,mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, limits)
    _call("umount2", _HOST.encode(), _DETACH)
    os.rmdir(_HOST)
    _set_attributes("/", _READ_ONLY, 0)
    _call("sethostname", b"sandbox", 7)


def _show(here: str, there: str, attributes: int) -> None:
    if os.path.isdir(_HOST + here):
        os.makedirs(there, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.close(os.open(there, os.O_CREAT | os.O_WRONLY, 0o755))
    _mount(_HOST + here, there, "", _BIND | _RECURSIVE)
    _set_attributes(there, attributes, _AT_RECURSIVE)


def _drop_privileges(uid: int | None) -> None:
    capability = 0
    while _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", version_3, (ctypes.c_uint32 * 6)())
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def _unshare(flags: int) -> bool:
    return bool(_libc.unshare(flags) == 0)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    """mount_setattr (Linux 5.12): adds attributes to a mount, and with _AT_RECURSIVE to all below it."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, wanted, ctypes.sizeof(wanted))


def _pivot_root(new: str, old: str) -> None:
    number = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    _call("syscall", number, new.encode(), old.encode())


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}", str(arguments[:2]))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
