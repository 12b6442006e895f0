"""A setting of the C library's memory allocator, which it reads when the process starts.

XLA's CPU backend allocates its temporary buffers anew at every step. The kernel provides them in
pages of 4 KiB, and the page faults are a fifth of the time of a small model's step. Pages of 2 MiB
avoid them.
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
    """Starts this program again, with the same process id, with huge pages for large buffers.

    It does nothing

    - if the user has set `GLIBC_TUNABLES`; an empty value switches this function off, and its own
      value keeps the second start from a third;
    - without glibc 2.35 or newer, or unless Linux gives huge pages on request (`madvise`);
    - unless the process is `python SCRIPT ARGUMENTS` (which the command `gptjax` is too) or
      `python -m gptjax ARGUMENTS`: the process of a notebook or a debugger must not be replaced;
    - if Python cannot be started again.
    """
    if _VARIABLE in os.environ or not (is_available() and _can_restart()):
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):  # then the program runs on without huge pages
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_available() -> bool:
    """Returns whether the C library and the kernel give huge pages on request."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        on_request = "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # another system or another C library
        return False
    return on_request and library == "glibc" and tuple(map(int, version.split("."))) >= _GLIBC


def _can_restart() -> bool:
    """Returns whether the process is `python [OPTIONS] SCRIPT` or `-m gptjax`, with arguments."""
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
