"""Reads a few fields of X.509 certificates and revocation lists, which the standard library does not show."""

from __future__ import annotations

from collections.abc import Iterator
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


def named(der: bytes) -> tuple[bytes, bytes]:
    """Issuer and serial number of a certificate, as encoded there. ValueError. RFC 5280 4.1."""
    try:
        certificate, _ = _element(der, 0, 0x30)
        fields, _ = _element(certificate, 0, 0x30)
        offset = 0
        if fields[0] == 0xA0:
            _, offset = _element(fields, offset, 0xA0)
        serial, offset = _element(fields, offset, 0x02)
        _, offset = _element(fields, offset, 0x30)
        issuer, _ = _element(fields, offset, 0x30)
    except IndexError:
        raise ValueError("not an X.509 certificate") from None
    return issuer, serial


def listed(der: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Issuer and serial number of the certificates a revocation list names. ValueError. RFC 5280 5.1."""
    try:
        whole, _ = _element(der, 0, 0x30)
        fields, _ = _element(whole, 0, 0x30)
        offset = 0
        if fields[0] == 0x02:  # the version, absent in version 1
            _, offset = _element(fields, offset, 0x02)
        _, offset = _element(fields, offset, 0x30)
        issuer, offset = _element(fields, offset, 0x30)
        while offset < len(fields) and fields[offset] in (0x17, 0x18):  # this update, next update
            _, offset = _element(fields, offset, fields[offset])
        if offset == len(fields) or fields[offset] != 0x30:
            return  # nobody is revoked
        entries, _ = _element(fields, offset, 0x30)
        offset = 0
        while offset < len(entries):
            entry, offset = _element(entries, offset, 0x30)
            serial, _ = _element(entry, 0, 0x02)
            yield issuer, serial
    except IndexError:
        raise ValueError("not a revocation list") from None


def _element(data: bytes, offset: int, tag: int) -> tuple[bytes, int]:
    if data[offset] != tag:
        raise ValueError("not of X.509")
    length = data[offset + 1]
    offset += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[offset : offset + size], "big")
        offset += size
    if offset + length > len(data):
        raise ValueError("cut short")
    return data[offset : offset + length], offset + length


def _time(data: bytes, offset: int) -> tuple[datetime, int]:
    tag = data[offset]
    text, offset = _element(data, offset, 0x17 if tag == 0x17 else 0x18)
    moment = text.decode("ascii")
    if tag == 0x17:  # UTCTime has two digits of the year; 50 and above are 19xx
        moment = ("19" if moment[:2] >= "50" else "20") + moment
    return datetime.strptime(moment, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC), offset
