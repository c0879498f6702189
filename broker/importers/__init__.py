"""Reads the configuration of other brokers and writes it as fragments. Not a part of a running broker."""
