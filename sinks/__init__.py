"""Backends that carry messages into other systems; one file each."""
