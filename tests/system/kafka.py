"""`make kafka`: an Apache Kafka at 127.0.0.1:9092 to try the sink with; shows what arrives in the topic `telemetry`."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from tests import servers

PORT = 9092
TOPIC = "telemetry"


async def show(kafka: servers.Kafka) -> None:
    """Print records as they arrive, until cancelled."""
    from aiokafka import AIOKafkaConsumer

    await kafka.create_topic(TOPIC, partitions=3)
    consumer = AIOKafkaConsumer(TOPIC, bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    print(f"Kafka is up at {kafka.bootstrap} with the topic {TOPIC}; what arrives there is shown here. Ctrl-C ends it.")
    try:
        async for record in consumer:
            headers = {name: value.decode(errors="replace") for name, value in record.headers}
            key = (record.key or b"").decode(errors="replace")
            value = (record.value or b"").decode(errors="replace")
            print(f"{headers.get('mqtt-topic', TOPIC)}  key={key}  {value}", flush=True)
    finally:
        await consumer.stop()


def main() -> int:
    """Start, show, and leave nothing behind."""
    if servers.accepts(PORT):
        print(f"port {PORT} is taken: a Kafka seems to run there already", file=sys.stderr)
        return 1
    try:
        with servers.kafka(port=PORT) as kafka, contextlib.suppress(KeyboardInterrupt):
            asyncio.run(show(kafka))
    except servers.Absent as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
