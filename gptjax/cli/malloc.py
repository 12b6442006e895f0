"""Huge pages: a setting of the C library's memory allocator.

XLA's CPU backend allocates its temporary buffers again at every step. Linux provides them in pages
of 4 KiB, and the page faults take a fifth of the time of a small model's step. Pages of 2 MiB
avoid the page faults. The C library reads the setting only when the process starts.
"""

import contextlib
import os
import pathlib
import sys

_VARIABLE = "GLIBC_TUNABLES"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GLIBC = (2, 35)
_MODULE = "gptjax"


def use_huge_pages() -> None:
    """Restarts this program, with the same process id, with huge pages for large buffers.

    The function sets `GLIBC_TUNABLES` for the restarted program. It returns without a restart in
    these cases:

    - `GLIBC_TUNABLES` is set, even if it is empty. The user can switch the function off in this
      way, and the restarted program does not restart again.
    - The C library is not glibc, or is older than glibc 2.35, or Linux does not give huge pages on
      request (`madvise`).
    - The command of the process is neither `python SCRIPT ARGUMENTS` (the form that the command
      `gptjax` has too) nor `python -m gptjax ARGUMENTS`. The process of a notebook or a debugger
      must not be replaced.
    - Python cannot be started again.
    """
    if _VARIABLE in os.environ or not (is_available() and _can_restart()):
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):  # if it fails, the program goes on without huge pages
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_available() -> bool:
    """Returns whether the C library and Linux give huge pages on request."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        on_request = "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # not Linux, or not glibc
        return False
    return on_request and library == "glibc" and tuple(map(int, version.split("."))) >= _GLIBC


def _can_restart() -> bool:
    """Returns whether the command of this process can be repeated to restart it.

    The command must be `python [OPTIONS] SCRIPT ARGUMENTS` or
    `python [OPTIONS] -m gptjax ARGUMENTS`.
    """
    end = len(sys.orig_argv) - len(sys.argv) + 1
    start, arguments = sys.orig_argv[1:end], sys.orig_argv[end:]
    if not start or not sys.executable or arguments != sys.argv[1:]:
        return False
    *options, program = start
    if options[-1:] == ["-m"] and program == _MODULE:
        options.pop()
    elif program != sys.argv[0]:
        return False
    return all(option.startswith("-") and option[1:2] not in "mc" for option in options)
