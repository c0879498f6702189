"""What EMQX 5 sends elsewhere: bridges, connectors with actions and sources, and the rules that feed them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.importers.imported import EMQX5, Import

OLD_BRIDGE = """
bridges.mqtt.hq {
  server = "127.0.0.1:1884"
  proto_ver = v4
  clean_start = false
  bridge_mode = true
  ssl { enable = false }
  egress {
    local { topic = "up/#" }
    remote { topic = "plant/${topic}", qos = "${qos}", retain = "${retain}", payload = "${payload}" }
  }
  ingress {
    remote { topic = "down/#", qos = 1 }
    local { topic = "hq/${topic}", qos = "${qos}", payload = "${payload}" }
  }
}
"""


def test_a_bridge_of_5_0_to_5_3(run: Import) -> None:
    done = run("emqx", EMQX5 + OLD_BRIDGE)
    assert done.at("bridges.hq") == {
        "kind": "mqtt",
        "servers": ["mqtt://127.0.0.1:1884"],
        "protocol": "3.1.1",
        "try_private": True,
        "clean_session": False,
        "topics": [
            {"filter": "up/#", "remote_prefix": "plant/", "direction": "out", "qos": 2},
            {"filter": "down/#", "local_prefix": "hq/", "direction": "in", "qos": 1},
        ],
    }
    assert [row.split(": ")[1] for row in done.lost] == ["authentication"]
    assert done.check() == (0, "")


def test_a_source_and_the_rule_that_republishes_what_it_brings(run: Import) -> None:
    text = """
connectors.mqtt.hq { server = "127.0.0.1:1884" }
sources.mqtt.orders { connector = hq, parameters { topic = "orders/one", qos = 2 } }
rule_engine.rules.in {
  sql = "SELECT * FROM \\"$bridges/mqtt:orders\\""
  actions = [{ function = republish, args { topic = "plant/orders", payload = "${payload}", qos = "${qos}" } }]
}
"""
    done = run("emqx", EMQX5 + text)
    assert done.at("bridges.hq.topics") == [
        {"filter": "", "remote_prefix": "orders/one", "local_prefix": "plant/orders", "direction": "in", "qos": 2}
    ]
    assert done.check() == (0, "")


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ('topic = "${clientid}/x"', "topic"),
        ('topic = "${topic}", payload = "${payload.value}"', "payload"),
        ('topic = "one"', "topic"),
    ],
)
def test_what_a_bridge_cannot_do_is_told(run: Import, parameters: str, key: str) -> None:
    text = f"""
connectors.mqtt.hq {{ server = "127.0.0.1:1884" }}
actions.mqtt.up {{ connector = hq, local_topic = "a/#", parameters {{ {parameters} }} }}
"""
    done = run("emqx", EMQX5 + text)
    assert done.at("bridges") is None
    assert [row.split(": ")[:2] for row in done.lost if "actions" in row] == [
        ["5", f"actions.mqtt.up.parameters.{key}"]
    ]
    assert done.check() == (0, "")


RULE = 'rule_engine.rules.r { sql = "SELECT * FROM \\"t/#\\", \\"u\\"", actions = ["%s:x"] }\n'
SINKS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "http",
        'connectors.http.c { url = "https://hooks.example/", ssl { enable = true, verify = verify_peer } }\n'
        'actions.http.x { connector = c, parameters { path = "/mqtt/${clientid}", method = put, '
        'headers { Authorization = "Bearer s3cret" }, body = "${payload}" } }\n',
        {
            "kind": "http",
            "url": "https://hooks.example/mqtt/${clientid}",
            "method": "PUT",
            "headers": {"Authorization": "Bearer s3cret"},
            "body": "${payload}",
        },
    ),
    (
        "webhook",
        'bridges.webhook.x { url = "http://10.0.0.1/mqtt", method = post }\n',
        {"kind": "http", "url": "http://10.0.0.1/mqtt", "method": "POST", "allow_cleartext": True},
    ),
    (
        "kafka",
        'bridges.kafka.x { bootstrap_hosts = "k1:9092,k2", kafka { topic = t, compression = no_compression }\n'
        "authentication { mechanism = scram_sha_512, username = u, password = s3cret }, ssl { enable = true } }\n",
        {
            "kind": "kafka",
            "servers": ["k1:9092", "k2:9092"],
            "topic": "t",
            "compression": "none",
            "sasl": {"mechanism": "scram-sha-512", "username": "u", "password": "s3cret"},
            "tls": True,
        },
    ),
    (
        "pgsql",
        "connectors.pgsql.c { server = localhost, database = plant, username = u, password = s3cret }\n"
        'actions.pgsql.x { connector = c, parameters { sql = "insert into readings (id, topic, value) '
        'values (${id}, ${topic}, ${payload})" } }\n',
        {
            "kind": "postgresql",
            "dsn": "postgresql://u@localhost:5432/plant",
            "password": "s3cret",
            "table": "readings",
            "columns": {"id": "${msgid}", "topic": "${topic}", "value": "${payload}"},
        },
    ),
]


@pytest.mark.parametrize(("kind", "text", "wanted"), SINKS)
def test_sinks(run: Import, kind: str, text: str, wanted: dict[str, Any]) -> None:
    done = run("emqx", EMQX5 + text + RULE % kind)
    assert done.code == 0, done.stderr
    assert done.at("sinks.x") == {"filters": ["t/#", "u"], **wanted}
    assert [row.split(": ")[1] for row in done.lost] == ["authentication"]
    assert "s3cret" not in done.stdout
    assert done.check() == (0, "")


def test_a_sink_no_message_reaches_is_told(run: Import) -> None:
    done = run("emqx", f'{EMQX5}bridges.webhook.x {{ url = "http://localhost/" }}\n')
    assert done.at("sinks") is None
    assert ["3", "bridges.webhook.x"] in [row.split(": ")[:2] for row in done.lost]


def test_a_statement_with_a_function_is_told(run: Import) -> None:
    text = (
        "connectors.mysql.c { server = localhost, database = plant, username = u }\n"
        "actions.mysql.x { connector = c\n"
        'parameters { sql = "insert into t (at) values (from_unixtime(${timestamp}))" } }\n'
    )
    done = run("emqx", EMQX5 + text + RULE % "mysql")
    assert done.at("sinks") is None
    assert ["5", "actions.mysql.x.parameters.sql"] in [row.split(": ")[:2] for row in done.lost]
    assert done.check() == (0, "")


def test_a_sink_and_a_bridge_of_one_name_are_told_apart(run: Import) -> None:
    """Their queues would be one."""
    text = (
        'connectors.mqtt.x { server = "127.0.0.1:1884" }\nactions.mqtt.x { connector = x, local_topic = "a/#" }\n'
        'bridges.webhook.x { url = "http://localhost/", local_topic = "a/#" }\n'
    )
    done = run("emqx", EMQX5 + text)
    assert list(done.at("bridges")) == ["x"]
    assert list(done.at("sinks")) == ["x-2"]
    assert done.check() == (0, "")
