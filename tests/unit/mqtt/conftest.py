"""Every test that takes ``wire`` runs on the interpreted room and, where there is one, on the compiled room."""

from __future__ import annotations

import pytest

from tests.packets.codec import Wire, wires

_WIRES = wires()


@pytest.fixture(params=sorted(_WIRES), scope="session")
def wire(request: pytest.FixtureRequest) -> Wire:
    return _WIRES[request.param]
