"""Packets that every room's tests share."""
