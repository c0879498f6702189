"""Whether a topic filter is one, MQTT 5 section 4.7. Says in words what is wrong with it."""

from __future__ import annotations


def check_filter(text: str) -> None:
    """Raise ValueError when `text` is not a valid topic filter, shared subscriptions included."""
    if not text:
        raise ValueError("a topic filter has at least one character")  # [MQTT-4.7.3-1]
    if "\0" in text:
        raise ValueError("a topic filter holds no NUL")  # [MQTT-4.7.3-2]
    if len(text.encode("utf-8", "surrogatepass")) > 65_535:
        raise ValueError("a topic filter has at most 65535 bytes")  # [MQTT-4.7.3-3]
    if text.startswith("$share/"):
        name, _, rest = text.removeprefix("$share/").partition("/")
        if not name or "+" in name or "#" in name or not rest:
            raise ValueError(f"{text!r} is not $share/NAME/FILTER")  # [MQTT-4.8.2-1] [MQTT-4.8.2-2]
        text = rest
    levels = text.split("/")
    for position, level in enumerate(levels, 1):
        if "#" in level and (level != "#" or position != len(levels)):
            raise ValueError(f"{text!r}: # stands alone in the last level")  # [MQTT-4.7.1-1]
        if "+" in level and level != "+":
            raise ValueError(f"{text!r}: + stands alone in its level")  # [MQTT-4.7.1-2]
