"""The control socket and what answers on it."""
