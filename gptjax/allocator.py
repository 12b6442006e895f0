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


def use_huge_pages() -> None:
    """Starts this program again, once and as the same process, with huge pages for large buffers.

    Does nothing where they are not on offer (only Linux's "madvise" needs asking) or where the user
    has set `GLIBC_TUNABLES`, which also is how to switch this off: `GLIBC_TUNABLES= python ...`.
    Other C libraries than glibc ignore the variable.
    """
    if _VARIABLE in os.environ or not _on_offer():
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):  # a Python that cannot be started again runs on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_offer() -> bool:
    try:
        return "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except OSError:
        return False
