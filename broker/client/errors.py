"""How a connection to a broker fails. All of them are ConnectionErrors."""

from __future__ import annotations

from broker.mqtt.codes import ReasonCode

_FROM_V3 = {1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}


def reason(code: int) -> str:
    """A reason code as people read it: ``not authorized (0x87)``."""
    try:
        name = ReasonCode(code).name.replace("_", " ").lower()
    except ValueError:
        name = "unknown reason"
    return f"{name} (0x{code:02x})"


class Unreachable(ConnectionError):
    """No transport to the broker: the name does not resolve, the port does not answer, TLS fails."""


class NoAnswer(ConnectionError):
    """The broker took the transport but closed it, or stayed silent, instead of answering CONNECT."""


class TimedOut(NoAnswer):
    """The broker took the transport and stayed silent, or the transport itself was not there in time."""


class Refused(ConnectionError):
    """The broker answered CONNECT with a refusal; `code` is the MQTT 5 reason, also when the broker spoke 3.x."""

    def __init__(self, code: int, version: int, text: str | None = None) -> None:
        self.code = _FROM_V3.get(code, code) if version < 5 else code
        super().__init__(f"the broker refused the connection: {reason(self.code)}" + (f": {text}" if text else ""))


class Disconnected(ConnectionError):
    """The broker sent DISCONNECT; `code` is its reason."""

    def __init__(self, code: int, text: str | None = None) -> None:
        self.code = code
        super().__init__(f"the broker disconnected us: {reason(code)}" + (f": {text}" if text else ""))


class Silent(ConnectionError):
    """The broker did not answer a ping in time."""


class BrokenPeer(ConnectionError):
    """The broker sent something that MQTT forbids."""
