# One command each; .ci/run calls these and nothing else. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := broker auth bridges sinks
CODE := $(ROOMS) tests compose setup.py
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
BUILD := setup.py --quiet build_ext --inplace --parallel $(JOBS)
NAME ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test servers check format bench demo kafka compile pure integration interpreted conformance matrix soak durable canary drain logins power chaos reference picture dist clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	ISTHMUS_COMPILE=never $(BIN)/python -m pip install --quiet --editable '.[all,test]'
	touch $@

setup: $(STAMP)  ## .venv with the compiled package; afterwards .venv/bin/isthmus exists
	@$(BIN)/python $(BUILD)
	@$(BIN)/python -m tests.build report

compile: $(STAMP)  ## compile the message path beside its sources; fails where it cannot
	ISTHMUS_COMPILE=always $(BIN)/python $(BUILD)
	@$(BIN)/python -m tests.build report --all

pure:  ## remove the compiled files: everything runs interpreted
	find $(ROOMS) \( -name '*.so' -o -name '*.pyd' \) -delete
	rm -rf build/cython build/lib.* build/temp.*

run: setup  ## start with the shipped conf.d on loopback, with a user to try it
	$(BIN)/isthmus run $(ARGS)

servers: $(STAMP)  ## install what the tests start: slapd, mosquitto, Apache Kafka; says what it does
	$(BIN)/python -m tests.servers install

test: setup servers  ## every test, on the compiled build
	$(BIN)/python -m tests.run $(ARGS)

integration: setup servers  ## tests of one backend against its real server: make integration NAME=kafka
	$(BIN)/python -m pytest tests/integration $(if $(NAME),-k $(NAME)) $(ARGS)

interpreted: $(STAMP)  ## unit, packet and conformance tests interpreted, on plain asyncio, in a clean copy
	$(BIN)/python -m tests.build interpreted $(ARGS)

check: $(STAMP)  ## format, lint, strict types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

format: $(STAMP)  ## settle the layout of the code
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

demo: setup servers  ## the main job, hop by hop: LDAP login, publish, Kafka, SQLite, mosquitto and back
	$(BIN)/python -m tests.system.demo

kafka: setup servers  ## an Apache Kafka at 127.0.0.1:9092 that shows what arrives in its topic telemetry
	$(BIN)/python -m tests.system.kafka

bench: compile servers  ## every row of the targets beside mosquitto: ARGS="--quick --rows 1-1"
	$(BIN)/python -m tests.benchmarks.bench $(ARGS)

conformance: setup  ## Eclipse Paho interoperability suite from the checkout at $PAHO_TESTING
	$(BIN)/python -m tests.conformance.paho_runner $(ARGS)

matrix: servers  ## the tests on every supported Python found on this machine
	$(BIN)/python -m tests.build matrix $(ARGS)

soak: setup servers  ## the long forms: everything marked slow, three times
	for n in 1 2 3; do ISTHMUS_SOAK=1 $(BIN)/python -m pytest -m slow --timeout 900 $(ARGS) || exit 1; done

ROUNDS ?= 200
chaos: compile servers  ## kill -9 the broker and its workers at random under load: make chaos ROUNDS=20
	$(BIN)/python -m tests.chaos --rounds $(ROUNDS) $(ARGS)

durable: compile  ## what safety costs: QoS 1 and 2 into queues on disk, and what comes back after a kill
	$(BIN)/python -m tests.benchmarks.durable $(ARGS)

canary: compile servers  ## the slowest round trip of a quiet client beside floods: ARGS="--rows line --seconds 10"
	$(BIN)/python -m tests.benchmarks.canary $(ARGS)

drain: compile servers  ## how fast a backlog goes into databases, beside their drivers: ARGS="postgresql mysql"
	$(BIN)/python -m tests.benchmarks.drain $(ARGS)

logins: setup servers  ## how fast clients are let in, beside each driver: ARGS="ldap redis"
	$(BIN)/python -m tests.benchmarks.logins $(ARGS)

power: setup  ## cut the power 200 times and count what is lost; ARGS="--states 20 --seed 7"
	$(BIN)/python -m tests.power --ext4 50 $(ARGS)

reference: $(STAMP)  ## write REFERENCE.md from the models
	$(BIN)/python -m broker config reference >REFERENCE.draft && mv REFERENCE.draft REFERENCE.md

picture:  ## everything in containers: broker, LDAP, Kafka, PostgreSQL, mosquitto
	docker compose -f compose/compose.yaml up --build

dist: $(STAMP)  ## wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean: pure  ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/benchmarks/mqttload
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
