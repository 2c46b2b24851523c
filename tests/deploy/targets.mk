.PHONY: rpm image test-image vm

rpm: ## the RPM for Amazon Linux, into dist/
	@mkdir -p dist build/rpm
	rpmbuild -bb --quiet --define "_topdir $(CURDIR)/build/rpm" --define "_sourcedir $(CURDIR)" sysctl/core-dump-handler.spec
	@cp build/rpm/RPMS/noarch/*.rpm dist/ && ls dist/*.rpm

IMAGE ?= core-dump-collector:0.1.0
image: ## IMAGE=name:tag: the collector's container image
	docker build -f collector/Dockerfile -t $(IMAGE) .

test-image: $(READY) ## build the image with Docker and collect a crash from another container; root
	@tests/deploy/roots.sh $(abspath $(BIN)/python)
	DEPLOY_TIER=image $(BIN)/python -m pytest --timeout 900 tests/deploy/test_image.py

vm: $(READY) ## install, boot, crash and uninstall in virtual machines (qemu); root
	@tests/deploy/roots.sh $(abspath $(BIN)/python) vm
	DEPLOY_TIER=vm $(BIN)/python -m pytest --timeout 900 tests/deploy/test_vm.py
