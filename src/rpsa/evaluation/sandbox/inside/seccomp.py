"""A seccomp filter: system calls that no answer to a programming problem needs, and that escapes begin with.

Allowed by default: the namespaces hide files, processes and the network, and the filter closes what they leave
open: sockets that no network namespace holds (vsock reaches a virtual machine's host), memory that no limit
counts (memfd, System V), keyrings, tracing, new namespaces, and the kernel's newer and larger interfaces.
"""

import ctypes
import errno
import platform
import re
import struct

# name, number on x86_64, number on aarch64 (Linux asm/unistd_64.h, asm-generic/unistd.h)
_DENIED = re.findall(
    r"(\w+) (\d+) (\d+)",
    """
    acct 163 89   add_key 248 217   adjtimex 159 171   bpf 321 280   chroot 161 51   clock_adjtime 305 266
    clock_settime 227 112   delete_module 176 106   fanotify_init 300 262   finit_module 313 273
    fsconfig 431 431   fsmount 432 432   fsopen 430 430   fspick 433 433   init_module 175 105
    io_uring_enter 426 426   io_uring_register 427 427   io_uring_setup 425 425   kcmp 312 272
    kexec_file_load 320 294   kexec_load 246 104   keyctl 250 219   lookup_dcookie 212 18   mbind 237 235
    memfd_create 319 279   memfd_secret 447 447   migrate_pages 256 238   mount 165 40   mount_setattr 442 442
    move_mount 429 429   move_pages 279 239   msgget 68 186   name_to_handle_at 303 264
    open_by_handle_at 304 265   open_tree 428 428   perf_event_open 298 241   personality 135 92
    pidfd_getfd 438 438   pivot_root 155 41   process_madvise 440 440   process_vm_readv 310 270
    process_vm_writev 311 271   ptrace 101 117   quotactl 179 60   quotactl_fd 443 443   reboot 169 142
    request_key 249 218   semget 64 190   set_mempolicy 238 237   setdomainname 171 162   sethostname 170 161
    setns 308 268   settimeofday 164 170   shmget 29 194   swapoff 168 225   swapon 167 224   syslog 103 116
    umount2 166 39   unshare 272 97   userfaultfd 323 282   vhangup 153 58
    """,
)
# column of the table, audit architecture, clone, socket
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 41), "aarch64": (1, 0xC00000B7, 220, 198)}
_CLONE3 = 435
_NAMESPACE_FLAGS = 0x7E020080  # CLONE_NEW*
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: all three belong to the network namespace

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def forbid_system_calls() -> None:
    """Install the filter in this process and all its children to come; it cannot be taken off.

    Raises OSError where the machine or the kernel has no such filter.
    """
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system call table for {platform.machine()}")
    filters = b"".join(struct.pack("=HBBI", *instruction) for instruction in _program(platform.machine()))
    code = ctypes.create_string_buffer(filters, len(filters))

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = _Program(len(filters) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    for arguments in ((no_new_privileges, 1, 0), (seccomp, filter_mode, ctypes.byref(program))):
        if libc.prctl(*arguments, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl refused the system call filter")


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF: (code, jump if true, jump if false, operand), jumps relative to the next instruction."""
    column, architecture, clone, socket = _MACHINES[machine]
    deny = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32 numbers
        deny,
        (_EQUAL, 0, 1, _CLONE3),  # its flags lie in memory, out of a filter's sight: libc falls back to clone
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    for _, *numbers in _DENIED:
        program += [(_EQUAL, 0, 1, int(numbers[column])), deny]
    program += [
        (_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS),
        deny,
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 5, socket),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
    ]
    program += [(_EQUAL, len(_SOCKET_FAMILIES) - i, 0, family) for i, family in enumerate(_SOCKET_FAMILIES)]
    return [*program, deny, (_RETURN, 0, 0, _ALLOW)]
