# What a developer does here. Everything a target needs and lacks is installed by `make setup`.
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup demo lab test fuzz test-networks test-hosts test-judges soak bench check clean

help:
	@echo 'make demo   move a running guest between two hosts and judge it'
	@echo 'make lab    a shell on a host with KVM, emulated where this machine has none'
	@echo 'make test   unit tests, fuzzers, then all with real guests (in the lab where this machine has'
	@echo '            no KVM)'
	@echo 'make fuzz   all fuzzers, TIME=60 seconds each (TARGET="qmp virtio": these; SEED=1; JOBS=2)'
	@echo 'make test-networks   other projects'\'' networks and programs, the dear tests too'
	@echo 'make test-hosts   guests between emulated hosts of unlike CPUs'
	@echo 'make test-judges   clients made for QEMU, on our QMP server'
	@echo 'make soak   kills and migrations in a row, under load (MOVES=30)'
	@echo 'make bench  Godwit and QEMU side by side (QUICK=1: once, under six minutes;'
	@echo '            QEMU=PATH: another QEMU; BASE=PATH: another checkout of Godwit instead)'
	@echo 'make check  format, lint, types, import direction, unit tests'
	@echo 'make setup  install what is missing (the others do it too)'

setup:
	@scripts/setup

demo: setup
	@$(BIN)/python -m lab demo

lab: setup
	@$(BIN)/python -m lab shell

test: setup
	$(BIN)/pytest tests/unit tests/fuzz
	$(BIN)/python -m tests.fuzz.driver --time 20
	@scripts/vm-tests

# What is found is written to out/fuzz, with the command that replays it.
fuzz: setup
	@$(BIN)/python -m tests.fuzz.driver --time $(or $(TIME),60) --seed $(or $(SEED),1) \
		--jobs $(or $(JOBS),2) $(TARGET)

test-networks: setup
	@$(BIN)/python -m lab.networks.testpmd
	@scripts/vm-tests tests/networks --whole

test-hosts: setup
	@scripts/unlike-hosts

# Twenty kills during migrations of a Debian guest that writes, then migrations in a row under load.
soak: setup
	@scripts/vm-tests tests/vm/test_debian.py --whole
	@$(BIN)/python -m benchmarks.soak --moves $(or $(MOVES),30)

test-judges: setup
	@scripts/qmp-judges

# Byte code first, as setup does for src: the lab could not keep it.
bench: setup
	@$(BIN)/python -m compileall -q benchmarks
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(if $(QEMU),--qemu '$(QEMU)') \
		$(if $(BASE),--base '$(BASE)')

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit

clean:
	rm -rf out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
