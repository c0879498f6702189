"""The servers the other tests lean on are real and hold what they promise."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import Any

import pytest
from paho.mqtt import client as paho

from tests import servers

ldap3 = pytest.importorskip("ldap3")
aiokafka = pytest.importorskip("aiokafka")


def test_the_directory_keeps_member_of_and_nests_groups(slapd: servers.Slapd) -> None:
    admin = slapd.connect()
    admin.search(slapd.people_dn, "(uid=bob)", attributes=["memberOf"])
    assert admin.entries[0].memberOf.values == [f"cn=operators,{slapd.groups_dn}"]
    admin.search(slapd.groups_dn, f"(member=cn=night-shift,{slapd.groups_dn})", attributes=["cn"])
    assert [e.cn.value for e in admin.entries] == ["operators"]
    admin.unbind()


@pytest.mark.parametrize("way", ["starttls", "ldaps"])
def test_the_directory_speaks_tls_and_a_strange_authority_refuses_it(
    way: str, start_slapd: Callable[..., servers.Slapd], certs: servers.Certificates
) -> None:
    directory = start_slapd(tls=certs)

    def bind(ca: object) -> bool:
        tls = ldap3.Tls(ca_certs_file=str(ca), validate=ssl.CERT_REQUIRED)
        url = directory.ldaps_url if way == "ldaps" else directory.url
        server = ldap3.Server(url, tls=tls, connect_timeout=5)
        connection = ldap3.Connection(server, f"uid=alice,{directory.people_dn}", "alice-pw")
        try:
            connection.open()
            if way == "starttls":
                connection.start_tls()
            bound: bool = connection.bind()
            return bound
        finally:
            if connection.socket is not None:  # a refused certificate leaves it open
                connection.socket.close()

    assert bind(certs.ca)
    with pytest.raises(ldap3.core.exceptions.LDAPException):
        bind(certs.stranger_ca)


def test_a_stopped_directory_comes_back_with_its_people(start_slapd: Callable[..., servers.Slapd]) -> None:
    directory = start_slapd()
    directory.stop()
    assert not servers.accepts(directory.port)
    directory.start()
    admin = directory.connect()
    assert admin.search(directory.people_dn, "(uid=alice)")
    admin.unbind()


async def test_kafka_takes_and_gives_records(kafka: servers.Kafka) -> None:
    await kafka.create_topic("servers-self-test", partitions=2)
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, enable_idempotence=True)
    await producer.start()
    for n in range(10):
        await producer.send_and_wait("servers-self-test", b"%d" % n, key=b"k")
    await producer.stop()
    records = await kafka.read("servers-self-test", 10)
    assert [r.value for r in records] == [b"%d" % n for n in range(10)]


async def test_kafka_asks_for_credentials_on_its_other_listeners(
    start_kafka: Callable[..., servers.Kafka], certs: servers.Certificates
) -> None:
    kafka = start_kafka(listeners=["SASL", "SASLSSL", "TLS", "MTLS"], tls=certs)
    context = ssl.create_default_context(cafile=str(certs.ca))
    mutual = ssl.create_default_context(cafile=str(certs.ca))
    mutual.load_cert_chain(certs.client, certs.client_key)
    plain = {"sasl_mechanism": "PLAIN", "sasl_plain_username": "alice", "sasl_plain_password": "alice-pw"}
    scram = {"sasl_mechanism": "SCRAM-SHA-256", "sasl_plain_username": "bob", "sasl_plain_password": "bob-pw"}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("SASL", {"security_protocol": "SASL_PLAINTEXT", **plain}),
        ("SASLSSL", {"security_protocol": "SASL_SSL", "ssl_context": context, **scram}),
        ("TLS", {"security_protocol": "SSL", "ssl_context": context}),
        ("MTLS", {"security_protocol": "SSL", "ssl_context": mutual}),
    ]
    await kafka.create_topic("ways")
    for listener, options in ways:
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka.listeners[listener], **options)
        await producer.start()
        await producer.send_and_wait("ways", listener.encode())
        await producer.stop()
    assert {r.value for r in await kafka.read("ways", 4)} == {b"SASL", b"SASLSSL", b"TLS", b"MTLS"}
    wrong = {**plain, "sasl_plain_password": "nope"}
    refused = aiokafka.AIOKafkaProducer(
        bootstrap_servers=kafka.listeners["SASL"], security_protocol="SASL_PLAINTEXT", **wrong
    )
    with pytest.raises(aiokafka.errors.KafkaConnectionError):
        await refused.start()
    await refused.stop()


def test_mosquitto_asks_for_the_password_when_told_to(start_mosquitto: Callable[..., servers.Mosquitto]) -> None:
    server = start_mosquitto(username="region-1", password="secret")

    def connects(password: str) -> bool:
        answers: list[bool] = []
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.username_pw_set("region-1", password)
        client.on_connect = lambda _c, _u, _f, reason, _p: answers.append(not reason.is_failure)
        client.connect("127.0.0.1", server.port)
        deadline = time.monotonic() + 5
        while not answers and time.monotonic() < deadline:
            client.loop(0.1)
        client.disconnect()
        client.loop(0.1)
        return answers == [True]

    assert connects("secret")
    assert not connects("wrong")
