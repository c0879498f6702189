"""Reads the validity of an X.509 certificate; the standard library shows it for verified peers only."""

from __future__ import annotations

from datetime import UTC, datetime


def validity(der: bytes) -> tuple[datetime, datetime]:
    """Not before and not after. ValueError when the bytes are no certificate. RFC 5280 4.1."""
    try:
        certificate, _ = _element(der, 0, 0x30)
        fields, _ = _element(certificate, 0, 0x30)
        offset = 0
        if fields[0] == 0xA0:  # the version, absent in version 1
            _, offset = _element(fields, offset, 0xA0)
        for tag in (0x02, 0x30, 0x30):  # serial number, algorithm, issuer
            _, offset = _element(fields, offset, tag)
        period, _ = _element(fields, offset, 0x30)
        first, offset = _time(period, 0)
        last, _ = _time(period, offset)
    except IndexError:
        raise ValueError("not an X.509 certificate") from None
    return first, last


def _element(data: bytes, offset: int, tag: int) -> tuple[bytes, int]:
    if data[offset] != tag:
        raise ValueError("not an X.509 certificate")
    length = data[offset + 1]
    offset += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[offset : offset + size], "big")
        offset += size
    if offset + length > len(data):
        raise ValueError("the certificate is cut short")
    return data[offset : offset + length], offset + length


def _time(data: bytes, offset: int) -> tuple[datetime, int]:
    tag = data[offset]
    text, offset = _element(data, offset, 0x17 if tag == 0x17 else 0x18)
    moment = text.decode("ascii")
    if tag == 0x17:  # UTCTime has two digits of the year; 50 and above are 19xx
        moment = ("19" if moment[:2] >= "50" else "20") + moment
    return datetime.strptime(moment, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC), offset
