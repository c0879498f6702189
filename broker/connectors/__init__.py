"""Connections to outside systems that more than one room uses."""
