"""What survives a restart: an append-only journal in segments, its threads, its damage and its space on disk."""
