"""What can go wrong when a listener is opened or changed."""

from __future__ import annotations


class ListenError(Exception):
    """A listener cannot be opened. The text names the listener, the address or file, and the system's reason."""
