"""What a peer can do wrong."""

from __future__ import annotations


class ProtocolError(Exception):
    """The peer broke a rule of MQTT.

    ``code`` is the MQTT 5 reason to close with. ``version`` (3, 4 or 5) is set by `decode_connect` and says in which
    form to refuse; 0 means that the peer does not speak MQTT and gets no answer.
    """

    def __init__(self, code: int, text: str = "", version: int = 0) -> None:
        super().__init__(text or "the peer broke a rule of MQTT")
        self.code = int(code)
        self.version = version


class MalformedPacket(ProtocolError):
    """The bytes are not a packet (reason 0x81)."""

    def __init__(self, text: str = "malformed packet") -> None:
        super().__init__(0x81, text)
