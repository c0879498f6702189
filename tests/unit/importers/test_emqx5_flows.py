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
    assert done.lost_keys == ["authentication"]
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
            "value": "${.}",
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
    assert done.lost_keys == ["authentication"]
    assert "s3cret" not in done.stdout
    assert done.check() == (0, "")


def test_fields_with_a_point_before_them_are_the_same(run: Import) -> None:
    """As the dashboard of EMQX writes them."""
    text = (
        'bridges.kafka.x { bootstrap_hosts = "localhost:9092", kafka { topic = t\n'
        'message { key = "${.clientid}", value = "${.payload}", timestamp = "${.timestamp}" } } }\n'
    )
    done = run("emqx", EMQX5 + text + RULE % "kafka")
    assert (done.at("sinks.x.key"), done.at("sinks.x.value")) == ("${clientid}", "${payload}")
    assert done.lost_keys == ["authentication"]
    assert done.check() == (0, "")


def test_a_sink_whose_connector_is_off_is_off(run: Import) -> None:
    text = (
        'connectors.http.c { enable = false, url = "http://localhost/" }\n'
        'actions.http.x { connector = c, parameters { path = "/a" } }\n'
    )
    done = run("emqx", EMQX5 + text + RULE % "http")
    assert done.at("sinks.x.enabled") is False
    assert done.check() == (0, "")


def test_what_else_a_rule_does_is_told(run: Import) -> None:
    text = (
        'bridges.webhook.x { url = "http://localhost/" }\nrule_engine.rules.r {\nsql = "SELECT * FROM \\"t/#\\""\n'
        'actions = ["webhook:x", "mongodb:y", { function = republish, args { topic = "copy/${topic}" } }] }\n'
    )
    done = run("emqx", EMQX5 + text)
    assert done.at("sinks.x.filters") == ["t/#"]
    assert done.lost[1:] == [
        "6: rule_engine.rules.r.actions: of its actions there is no equivalent of mongodb:y, republish"
    ]


@pytest.mark.parametrize("topic", ["$events/client_connected", "$bridges/mqtt:other"])
def test_a_rule_about_what_no_client_publishes_feeds_nothing(run: Import, topic: str) -> None:
    text = (
        'bridges.webhook.x { url = "http://localhost/" }\n'
        f'rule_engine.rules.r {{ sql = "SELECT * FROM \\"{topic}\\"", actions = ["webhook:x"] }}\n'
    )
    done = run("emqx", EMQX5 + text)
    assert done.at("sinks") is None
    assert {"bridges.webhook.x", "rule_engine.rules.r.sql"} <= set(done.lost_keys)


def test_a_payload_that_is_made_anew_does_not_arrive_as_it_was(run: Import) -> None:
    changed = OLD_BRIDGE.replace(
        'qos = "${qos}", payload = "${payload}" }\n  }\n}', 'payload = "${payload.v}" }\n  }\n}'
    )
    assert changed != OLD_BRIDGE
    done = run("emqx", EMQX5 + changed)
    assert [line["direction"] for line in done.at("bridges.hq.topics")] == ["out"]
    assert "bridges.mqtt.hq.ingress.local.payload" in done.lost_keys


def test_a_republished_payload_that_is_made_anew_is_told(run: Import) -> None:
    text = """
connectors.mqtt.hq { server = "127.0.0.1:1884" }
sources.mqtt.orders { connector = hq, parameters { topic = "orders/one", qos = 2 } }
rule_engine.rules.in {
  sql = "SELECT * FROM \\"$bridges/mqtt:orders\\""
  actions = [{ function = republish, args { topic = "plant/orders", payload = "${payload.v}" } }]
}
"""
    done = run("emqx", EMQX5 + text)
    assert done.at("bridges") is None
    keys = set(done.lost_keys)
    assert {"sources.mqtt.orders.parameters.topic", "rule_engine.rules.in.sql"} <= keys


def test_flags_that_are_set_anew_are_told(run: Import) -> None:
    done = run(
        "emqx", EMQX5 + OLD_BRIDGE.replace('qos = "${qos}", payload = "${payload}" }\n  }\n}', "qos = 0 }\n  }\n}")
    )
    assert done.lost_keys == ["authentication", "bridges.mqtt.hq.ingress.local.qos"]


def test_a_sink_no_message_reaches_is_told(run: Import) -> None:
    done = run("emqx", f'{EMQX5}bridges.webhook.x {{ url = "http://localhost/" }}\n')
    assert done.at("sinks") is None
    assert ["3", "bridges.webhook.x"] in done.lost_at


def test_a_statement_with_a_function_is_told(run: Import) -> None:
    text = (
        "connectors.mysql.c { server = localhost, database = plant, username = u }\n"
        "actions.mysql.x { connector = c\n"
        'parameters { sql = "insert into t (at) values (from_unixtime(${timestamp}))" } }\n'
    )
    done = run("emqx", EMQX5 + text + RULE % "mysql")
    assert done.at("sinks") is None
    assert ["5", "actions.mysql.x.parameters.sql"] in done.lost_at
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
