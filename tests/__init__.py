"""The tests and the real servers they start."""
