"""Our MQTT client on our codec: workers, bridges and the load generator use it."""
