"""Returns to the system what uvloop's TLS keeps for each connection and an idle one does not need.

uvloop gives every TLS connection a buffer of 256 KiB for reading. The heap hands it out where other things have been
before, so it arrives with pages in it: an idle connection costs 47 kB. Between two reads the buffer holds nothing, and
without its pages the connection costs 24 kB; a read of up to 4 KiB needs one page again.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
from typing import Any

MADV_DONTNEED = 4

try:
    _madvise: Any = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
except (OSError, AttributeError):
    _madvise = None


def trim_tls(transport: Any) -> int:
    """Drop the pages of the transport's read buffer; bytes given back. Call it on the loop, outside of any read.

    0 where there is no such buffer: plain asyncio, another uvloop.
    """
    if _madvise is None:
        return 0
    for owner in gc.get_referents(transport):
        if type(owner).__name__ == "SSLProtocol" and type(owner).__module__.startswith("uvloop"):
            view = owner.get_buffer(1)
            start = ctypes.addressof(ctypes.c_char.from_buffer(view))
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            size = (start + len(view) - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if size > 0 and _madvise(first, size, MADV_DONTNEED) == 0:
                return size
    return 0
