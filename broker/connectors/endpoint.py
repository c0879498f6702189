"""Keys of tables that name servers reached over TCP, with or without TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from pydantic import model_validator

from broker.config.types import Address, ConfigPath
from broker.extend.registry import InstanceConfig


class Trust(InstanceConfig):
    """How TLS with another system is checked. Certificates and host names are always verified."""

    allow_cleartext: bool = False
    """Whether passwords and rights may cross the network unprotected."""
    ca: ConfigPath | None = None
    """File of certificate authorities (PEM) that may vouch for the servers, besides the system's."""
    certificate: ConfigPath | None = None
    """File with our own certificate (PEM), for servers that ask for one."""
    key: ConfigPath | None = None
    """File with the private key of `certificate`. Default: it is in the same file."""

    @model_validator(mode="after")
    def _check_key(self) -> Trust:
        if self.key is not None and self.certificate is None:
            raise ValueError("key without certificate")
        return self

    def context(self) -> ssl.SSLContext:
        """What TLS is checked with. ValueError when a file cannot be used."""
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"ca: {self.ca} cannot be used: {error.strerror or error}") from None
        try:
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"certificate: {self.certificate} cannot be used: {error.strerror or error}") from None
        return context


class Endpoint(Trust):
    """Servers that are spoken to with or without TLS."""

    tls: bool = False
    """Whether connections use TLS. Without it only servers on this machine are taken, see `allow_cleartext`."""

    def check_cleartext(self, servers: Iterable[Address]) -> None:
        """ValueError when one of the servers would be spoken to in the clear and nobody wrote that it may."""
        for address in servers:
            if not self.tls and not self.allow_cleartext and not address.loopback:
                raise ValueError(
                    f"{address} without TLS would send secrets unprotected to another machine; "
                    "write tls = true, or allow_cleartext = true"
                )
