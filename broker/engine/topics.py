"""Topic names and topic filters as bytes: validity, splitting, matching. MQTT 5 section 4.7."""

SLASH = 0x2F
PLUS = 0x2B
HASH = 0x23


def levels(topic: bytes) -> int:
    """Number of levels of a topic name or filter."""
    return topic.count(b"/") + 1


def is_wild(topic: bytes) -> bool:
    """Whether a wildcard character occurs anywhere."""
    return b"+" in topic or b"#" in topic


def valid_name(topic: bytes) -> bool:
    """Whether these bytes (already known to be UTF-8 without NUL) may name a topic."""
    return len(topic) > 0 and not is_wild(topic)  # [MQTT-3.3.2-2] [MQTT-4.7.3-1]


def valid_filter(filter: bytes) -> bool:
    """Whether wildcards stand alone in their level and `#` is last."""
    if not filter:
        return False  # [MQTT-4.7.3-1]
    if not is_wild(filter):
        return True
    parts = filter.split(b"/")
    last = len(parts) - 1
    for i, part in enumerate(parts):
        if b"#" in part and (part != b"#" or i != last):
            return False  # [MQTT-4.7.1-1]
        if b"+" in part and part != b"+":
            return False  # [MQTT-4.7.1-2]
    return True


def split_share(filter: bytes) -> tuple[bytes, bytes] | None:
    """`$share/group/filter` as (group, filter); None when the form is wrong. MQTT 5 section 4.8.2."""
    parts = filter.split(b"/", 2)
    if len(parts) != 3 or not parts[1] or not parts[2]:
        return None  # [MQTT-4.8.2-1]
    if is_wild(parts[1]):
        return None  # [MQTT-4.8.2-2]
    return parts[1], parts[2]


def matches(filter: bytes, topic: bytes) -> bool:
    """Whether a valid filter covers a valid topic name; root wildcards never match `$` topics [MQTT-4.7.2-1]."""
    if not is_wild(filter):
        return filter == topic
    if topic.startswith(b"$") and (filter.startswith(b"+") or filter.startswith(b"#")):
        return False  # [MQTT-4.7.2-1]
    f = filter.split(b"/")
    t = topic.split(b"/")
    n = len(t)
    for i, part in enumerate(f):
        if part == b"#":
            return True
        if i >= n or (part != b"+" and part != t[i]):
            return False
    return len(f) == n
