"""Backends that decide who may connect and what they may do; one file each."""
