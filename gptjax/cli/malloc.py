"""The C library's memory, which has to be set before the process starts.

XLA's CPU backend asks for its temporary buffers anew at every step, and the kernel hands them out
in pages of 4 KiB: page faults are a fifth of a small model's step. Pages of 2 MiB end them.
"""

import contextlib
import os
import pathlib
import sys

_VARIABLE = "GLIBC_TUNABLES"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GLIBC = (2, 35)


def use_huge_pages() -> None:
    """Starts this program again, once and as the same process, with huge pages for large buffers.

    Does nothing where that cannot help (it can with glibc 2.35 or newer on a Linux whose huge pages
    are for those who ask), where this is not simply `python PROGRAM` (a notebook's or a debugger's
    process is not ours to replace), or where the user has set `GLIBC_TUNABLES`: an empty value
    switches it off.
    """
    if _VARIABLE in os.environ or not (_on_offer() and _plain_start()):
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):  # a Python that cannot be started again runs on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_offer() -> bool:
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        offered = "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # another system, another C library
        return False
    return offered and library == "glibc" and tuple(map(int, version.split("."))) >= _GLIBC


def _plain_start() -> bool:
    """Whether this process is `python [options] PROGRAM ARGUMENTS`."""
    start = len(sys.orig_argv) - len(sys.argv)
    options, program = sys.orig_argv[1:start], sys.orig_argv[start:]
    ours = all(option.startswith("-") and option[1:2] not in "mc" for option in options)
    return bool(sys.executable) and program == sys.argv and ours
