"""Runs table entries through the codec, compiled or not."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import broker.mqtt
from broker.mqtt import connect as _connect
from broker.mqtt.framing import encode_length

_FOLDER = Path(broker.mqtt.__file__).parent
_ROOM = "broker.mqtt."
_SHARED = {_ROOM + "codes", _ROOM + "errors"}  # never compiled; both twins raise the same exceptions

COMPILED = not str(_connect.__file__).endswith(".py")
"""Whether ``import broker.mqtt.connect`` gives compiled code."""


class Wire(SimpleNamespace):
    """The modules of the room: ``connect``, ``control``, ``framing``, ``packets``, ``properties``, …"""


def wires() -> dict[str, Wire]:
    """``interpreted`` always, and ``compiled`` when the room is."""
    installed = Wire(**{name: import_module(_ROOM + name) for name in _modules()})
    return {"compiled": installed, "interpreted": _interpreted()} if COMPILED else {"interpreted": installed}


def _modules() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


class _Sources(MetaPathFinder):
    """Finds the .py of a module even where a compiled one lies beside it."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        source = _FOLDER / f"{name.removeprefix(_ROOM)}.py"
        if not name.startswith(_ROOM) or not source.is_file():
            return PathFinder.find_spec(name)
        return spec_from_file_location(name, source, loader=SourceFileLoader(name, str(source)))


def _interpreted() -> Wire:
    """The room imported once more from its sources, beside the compiled one, which stays what everybody imports."""
    kept: dict[str, ModuleType] = {}
    for name in [name for name in sys.modules if name.startswith(_ROOM) and name not in _SHARED]:
        kept[name] = sys.modules.pop(name)
        delattr(broker.mqtt, name.removeprefix(_ROOM))
    finder = _Sources()
    sys.meta_path.insert(0, finder)
    try:
        return Wire(**{name: import_module(_ROOM + name) for name in _modules()})
    finally:
        sys.meta_path.remove(finder)
        for name, module in kept.items():
            sys.modules[name] = module
            setattr(broker.mqtt, name.removeprefix(_ROOM), module)


def decode(wire: Wire, stream: bytes, version: int, from_client: bool) -> Any:
    """The only packet in ``stream``; None for a ping. Raises ProtocolError."""
    packets = wire.framing.FrameReader(300_000_000).feed(stream)
    assert len(packets) == 1, "the table holds whole packets, one at a time"
    return wire.packets.decode(*packets[0], version, from_client)


def describe(packet: Any) -> dict[str, Any]:
    """The fields of a packet, of its will and of its properties; absent properties are left out."""
    if packet is None:
        return {}
    fields = {name: getattr(packet, name) for name in type(packet).__slots__}
    if type(packet).__name__ == "Properties":
        return {name: value for name, value in fields.items() if value is not None and value != b""}
    for name in ("will", "properties"):
        if fields.get(name) is not None:
            fields[name] = describe(fields[name])
    return fields


def encode(wire: Wire, packet: Any, first_byte: int, version: int) -> bytes:
    """The bytes of a decoded packet again."""
    p = wire.packets
    kind = first_byte >> 4
    if kind == 3:
        block = b"" if packet.properties is None else wire.properties.encode_properties(packet.properties)
        bare = block[len(encode_length(len(block) - 1)) :] if block else b""
        head = (packet.topic, packet.payload, packet.qos, packet.retain, packet.dup, packet.packet_id, version)
        result: bytes = p.encode_publish(*head, bare)
        return result
    encoders = {
        1: lambda: p.encode_connect(packet),
        2: lambda: p.encode_connack(version, packet.session_present, packet.code, packet.properties),
        8: lambda: p.encode_subscribe(packet.packet_id, version, packet.filters, packet.properties),
        9: lambda: p.encode_suback(packet.packet_id, version, packet.codes, packet.properties),
        10: lambda: p.encode_unsubscribe(packet.packet_id, version, packet.filters, packet.properties),
        11: lambda: p.encode_unsuback(packet.packet_id, version, packet.codes, packet.properties),
        12: lambda: p.encode_pingreq(),
        13: lambda: p.encode_pingresp(),
        14: lambda: p.encode_disconnect(version, packet.code, packet.properties),
        15: lambda: p.encode_auth(packet.code, packet.properties),
    }
    if kind in encoders:
        result = encoders[kind]()
        return result
    result = p.encode_ack(kind, packet.packet_id, version, packet.code, packet.properties)
    return result
