"""Finds the key somebody meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel

MOVED: dict[str, str] = {
    # mosquitto.conf
    "acl_file": 'auth.NAME.rules with kind = "file"',
    "password_file": 'auth.NAME.passwords with kind = "file"',
    "persistence_location": "broker.data",
    "autosave_interval": "broker.durability",
    "persistence": "broker.durability",
    "max_inflight_messages": "limits.max_inflight",
    "persistent_client_expiration": "limits.session_expiry",
    "message_size_limit": "limits.max_packet_size",
    "listener": "listeners.NAME.bind",
    # EMQX
    "node": "broker.name",
    "authentication": "auth.NAME",
    "authorization": "auth.NAME",
    "mqtt": "limits",
    "retainer": "limits.max_retained_messages",
}
"""Keys of older versions and of other brokers, and where their meaning lives here."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "max_connection_rate": ("max_conn_rate", "conn_rate", "accept_rate", "connect_rate"),
    "servers": ("url", "urls", "uri", "uris", "host", "hosts", "server", "address", "addresses", "broker", "brokers",
                "bootstrap_servers", "endpoint", "endpoints", "remote"),
    "dsn": ("url", "uri", "connection", "connection_string", "conninfo"),
    "bind": ("address", "listen", "port", "host", "interface"),
    "filters": ("topics", "topic", "topic_filters", "subscribe", "subscriptions", "mqtt_topics"),
    "username": ("user", "login"),
    "password": ("pass", "passwd", "secret"),
    "bind_password": ("password", "bindpw", "root_pwd"),
    "bind_dn": ("user", "binddn", "root_dn"),
    "clientid": ("client_id", "remote_clientid"),
    "certificate": ("cert", "certfile", "cert_file", "tls_cert"),
    "key": ("keyfile", "key_file", "private_key", "tls_key"),
    "no_match": ("acl_nomatch", "nomatch"),
    "deny_action": ("acl_deny_action", "disconnect_if_pub_rejected"),
    "client_crl": ("crlfile", "crl_file", "crl"),
    "client_ca": ("cafile", "ca_file", "ca", "cacertfile"),
    "ca": ("cafile", "ca_file", "bridge_cafile", "cacertfile"),
    "origins": ("allowed_origins", "check_origins"),
    "passwords": ("password_file", "passwd_file"),
    "rules": ("acl_file", "acl"),
    "data": ("data_dir", "persistence_location"),
    "processes": ("count", "workers", "number"),
}  # fmt: skip
"""What people of other systems call our keys."""


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid key somebody who wrote `word` probably meant, by spelling or by meaning."""
    names = list(valid)
    candidates = {name: name for name in names}
    for name in names:
        for synonym in SYNONYMS.get(name, ()):
            candidates.setdefault(synonym, name)
    close = difflib.get_close_matches(word.lower(), candidates, n=1, cutoff=0.66)
    return candidates[close[0]] if close else None


def unknown(word: str, valid: Sequence[str], elsewhere: Iterable[str] = ()) -> str:
    """The sentence for an unknown key; `elsewhere` are whole keys of other tables that end in the same word."""
    other = next((key for key in elsewhere if key.rpartition(".")[2] == word), None)
    if word in MOVED and word not in valid:
        return f"unknown key, it is called {MOVED[word]} here"
    near = nearest(word, valid)
    if other and (near is None or difflib.SequenceMatcher(None, word, near).ratio() < 0.85):
        return f"unknown key, did you mean {other}?"
    if near:
        return f"unknown key, did you mean {near}?"
    return f"unknown key; there are: {', '.join(sorted(valid))}"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation mentions, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def models_at(model: type[BaseModel], path: Sequence[str | int]) -> list[type[BaseModel]]:
    """The models that may stand at `path` inside `model`."""
    here = [model]
    for part in path:
        inner = [
            m for owner in here if part in owner.model_fields for m in models_in(owner.model_fields[part].annotation)
        ]
        here = inner or here
    return here
