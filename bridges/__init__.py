"""Backends that join other brokers; one file each."""
