.PHONY: requirements rpm deb collector-packages image test-image test-cri vm

rpm: ## the RPM for Amazon Linux, into dist/
	@mkdir -p dist build/rpm
	rpmbuild -bb --quiet --define "_topdir $(CURDIR)/build/rpm" --define "_sourcedir $(CURDIR)" sysctl/core-dump-handler.spec
	@cp build/rpm/RPMS/noarch/*.rpm dist/ && ls dist/*.rpm

deb: rpm ## the helper as a Debian package, from that RPM
	sysctl/rpm2deb.sh dist/core-dump-handler-*.noarch.rpm dist

collector-packages: $(READY) ## the collector as RPM and Debian package, with an environment of its own for Python 3.11
	@mkdir -p dist build/rpm
	sysctl/collector-tree.sh build/collector $(BIN)/python
	rpmbuild -bb --quiet --define "_topdir $(CURDIR)/build/rpm" --define "_sourcedir $(CURDIR)/build/collector" sysctl/core-dump-collector.spec
	@cp build/rpm/RPMS/*/core-dump-collector-*.rpm dist/
	sysctl/rpm2deb.sh dist/core-dump-collector-*.rpm dist

IMAGE ?= core-dump-collector:0.1.0
image: ## IMAGE=name:tag [IMAGE_OPTIONS='--build-arg BASE=...']: the collector's container image
	docker build -f collector/Dockerfile -t $(IMAGE) $(IMAGE_OPTIONS) .

test-image: $(READY) ## build the image with Docker and collect a crash from another container; root
	@tests/deploy/roots.sh $(abspath $(BIN)/python)
	DEPLOY_TIER=image $(BIN)/python -m pytest --timeout 900 tests/deploy/test_image.py tests/deploy/test_requirements.py $(PYTEST_FLAGS)

test-cri: $(READY) ## run the pods of kubernetes/ with containerd, as the kubelet does; root
	@tests/deploy/roots.sh $(abspath $(BIN)/python)
	$(BIN)/pip install -q --disable-pip-version-check --group cri
	DEPLOY_TIER=cri unshare --mount --net sh -c 'ip link set lo up && exec "$$@"' sh \
	  $(BIN)/python -m pytest --timeout 900 tests/deploy/test_cri.py $(PYTEST_FLAGS)

vm: $(READY) ## install, boot, crash and uninstall in virtual machines (qemu); root
	@tests/deploy/roots.sh $(abspath $(BIN)/python) vm
	DEPLOY_TIER=vm $(BIN)/python -m pytest --timeout 900 tests/deploy/test_vm.py tests/deploy/test_walk.py $(PYTEST_FLAGS)

requirements: ## pin what the image holds anew, with hashes
	$(PYTHON) -m venv $(VENV)/pip-tools
	$(VENV)/pip-tools/bin/pip install -q --disable-pip-version-check pip-tools
	CUSTOM_COMPILE_COMMAND="make requirements" $(VENV)/pip-tools/bin/pip-compile -q --generate-hashes --no-annotate --strip-extras \
	  --no-emit-index-url --no-emit-find-links -o collector/requirements.txt pyproject.toml
