"""Why a store cannot be opened."""

from __future__ import annotations

REMEDY = (
    "isthmus store check says what is lost; restore the folder from a backup, "
    "or start with isthmus run --accept-loss to go on with what is good"
)


class StoreUnusable(Exception):
    """The store cannot be opened."""


class StoreDamaged(StoreUnusable):
    """Part of what was safe on disk is missing or changed."""


class StoreTooNew(StoreUnusable):
    """A later release wrote this store."""
