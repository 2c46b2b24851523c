.PHONY: requirements rpm image test-image test-cri vm

rpm: ## the RPM for Amazon Linux, into dist/
	@mkdir -p dist build/rpm
	rpmbuild -bb --quiet --define "_topdir $(CURDIR)/build/rpm" --define "_sourcedir $(CURDIR)" sysctl/core-dump-handler.spec
	@cp build/rpm/RPMS/noarch/*.rpm dist/ && ls dist/*.rpm

IMAGE ?= core-dump-collector:0.1.0
image: ## IMAGE=name:tag [IMAGE_OPTIONS='--build-arg BASE=...']: the collector's container image
	docker build -f collector/Dockerfile -t $(IMAGE) $(IMAGE_OPTIONS) .

test-image: $(READY) ## build the image with Docker and collect a crash from another container; root
	@tests/deploy/roots.sh $(abspath $(BIN)/python)
	DEPLOY_TIER=image $(BIN)/python -m pytest --timeout 900 tests/deploy/test_image.py tests/deploy/test_requirements.py

test-cri: $(READY) ## run the pods of kubernetes/ with containerd, as the kubelet does; root
	@tests/deploy/roots.sh $(abspath $(BIN)/python)
	$(BIN)/pip install -q --disable-pip-version-check --group cri
	DEPLOY_TIER=cri unshare --mount --net sh -c 'ip link set lo up && exec "$$@"' sh \
	  $(BIN)/python -m pytest --timeout 900 tests/deploy/test_cri.py

vm: $(READY) ## install, boot, crash and uninstall in virtual machines (qemu); root
	@tests/deploy/roots.sh $(abspath $(BIN)/python) vm
	DEPLOY_TIER=vm $(BIN)/python -m pytest --timeout 900 tests/deploy/test_vm.py

requirements: ## pin what the image holds anew, with hashes
	$(PYTHON) -m venv $(VENV)/pip-tools
	$(VENV)/pip-tools/bin/pip install -q --disable-pip-version-check pip-tools
	CUSTOM_COMPILE_COMMAND="make requirements" $(VENV)/pip-tools/bin/pip-compile -q --generate-hashes --no-annotate --strip-extras \
	  --no-emit-index-url --no-emit-find-links -o collector/requirements.txt pyproject.toml
