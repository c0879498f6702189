"""The Isthmus MQTT broker: wire, engine and edges."""

__version__ = "0.1.0"
