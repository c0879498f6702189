"""Who we are to a Kafka cluster, and how the connection is protected."""

from __future__ import annotations

import ssl
from typing import Any, Literal

from aiokafka.abc import AbstractTokenProvider
from pydantic import BaseModel, ConfigDict, model_validator

from broker.config.types import ConfigPath, Secret
from broker.extend.sink import Fatal
from sinks._kafka_tokens import Granted, TokenServer, Written


class Sasl(BaseModel):
    """`sasl = { … }`: who we are."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    mechanism: Literal["plain", "scram-sha-256", "scram-sha-512", "oauthbearer"] = "scram-sha-512"
    """How we prove it: plain | scram-sha-256 | scram-sha-512 | oauthbearer."""
    username: str = ""
    """User name, for all but `oauthbearer`."""
    password: Secret = Secret()
    """Password, for all but `oauthbearer`."""
    token: Secret = Secret()
    """The bearer token of `oauthbearer`."""
    token_file: ConfigPath | None = None
    """Instead of `token`: a file with the token, read for every connection, so that it may be renewed."""
    token_from: TokenServer | None = None
    """Instead of `token`: the OAuth 2 server that grants one, `{ url = "https://…", client_id = "…", client_secret =
    "${file:…}" }`. Needs `pip install 'isthmus[http]'`."""

    @model_validator(mode="after")
    def _complete(self) -> Sasl:
        if self.mechanism == "oauthbearer":
            if [bool(self.token), self.token_file is not None, self.token_from is not None].count(True) != 1:
                raise ValueError("oauthbearer needs either token, token_file or token_from")
        elif not self.username or not self.password:
            raise ValueError(f"{self.mechanism} needs username and password")
        return self


class Tls(BaseModel):
    """`tls = { … }`, or `true` for the system's authorities."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    ca: ConfigPath | None = None
    """Authorities to trust, PEM; the system's if it is not given."""
    certificate: ConfigPath | None = None
    """Our own certificate, PEM, for a cluster that asks for one."""
    key: ConfigPath | None = None
    """Its private key, PEM; in `certificate` if it is not given."""
    key_password: Secret = Secret()
    """Password of `key`."""
    verify: bool = True
    """`false` takes any certificate: encrypted, but anybody can stand in the middle."""

    def context(self) -> ssl.SSLContext:
        """Fatal names the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, self.key_password.reveal())
        except OSError as error:  # SSLError is one
            raise Fatal(f"tls: {self.ca or ''} {self.certificate or ''} {self.key or ''}: {error}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def token_provider(sasl: Sasl | None) -> AbstractTokenProvider | None:
    """What hands out the tokens of `oauthbearer`, and remembers those that were granted."""
    if sasl is None or sasl.mechanism != "oauthbearer":
        return None
    return Granted(sasl.token_from) if sasl.token_from is not None else Written(sasl.token, sasl.token_file)


def driver_options(sasl: Sasl | None, tls: Tls | None, tokens: AbstractTokenProvider | None) -> dict[str, Any]:
    """What the driver wants to be told. Fatal names a file that cannot be used."""
    options: dict[str, Any] = {"security_protocol": "PLAINTEXT"}
    if tls is not None:
        options |= {"security_protocol": "SSL", "ssl_context": tls.context()}
    if sasl is not None:
        options["security_protocol"] = "SASL_PLAINTEXT" if tls is None else "SASL_SSL"
        options["sasl_mechanism"] = sasl.mechanism.upper()
        if tokens is not None:
            options["sasl_oauth_token_provider"] = tokens
        else:
            options["sasl_plain_username"] = sasl.username
            options["sasl_plain_password"] = sasl.password.reveal()
    return options
