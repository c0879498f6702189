"""Kills the broker and its worker at random under load and compares what was acknowledged with what arrived.

`python -m tests.chaos --rounds N`: `ledger` has the books and says what is wrong, `devices` the clients that keep their
side of MQTT's promises, `victim` the processes that are killed, `outlets` what the sinks stored, `harness` one run.
"""
