# `make` alone lists the tasks. Each installs what it needs first (scripts/setup), by name and version.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
export ZEROFSCTL_TOOLS ?= $(HOME)/.cache/zerofsctl/tools
# cargo's own default is `target` here; both cargo and the recipes below follow this variable.
export CARGO_TARGET_DIR ?= $(CURDIR)/target

.DEFAULT_GOAL := help
.PHONY: help demo build test test-vm test-nbd test-k8s test-long check fmt lint scripts-lint deny generate generated bench bench-nbd bench-gc bench-rounds install clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A debug build: it is done in half the time of a release build, and the tests use it too.
demo: ## The whole story on this machine, from nothing: needs root
	@scripts/setup demo
	@$(CARGO) build --locked --bin zerofsctl
	@$(CARGO_TARGET_DIR)/debug/zerofsctl demo

build: ## The release binary
	@scripts/setup demo
	$(CARGO) build --locked --release --bin zerofsctl

test: ## All tests, with what they need: needs root
	@scripts/setup test vm
	$(CARGO) test --locked
	@scripts/vm-test

test-vm: ## The tests of kernel NBD alone, in machines that have it: needs root
	@scripts/setup test vm
	@scripts/vm-test

# For those whose own kernel has the module. Disconnects only what the tests connected.
test-nbd: ## The same on this machine: needs root and the kernel's nbd module (modprobe nbd nbds_max=64)
	@scripts/setup test
	@scripts/vm-test here

test-k8s: ## The tests with a real Kubernetes API server, which the first run builds: needs root
	@scripts/setup test k8s
	$(CARGO) test --locked --test gc_k8s

# Everything that takes long, with full counts: PART is one or more of the parts that scripts/test-long lists.
PART ?= all
test-long: ## The crash tests with full counts, and many more cases (PART="kills store death matrix model nbd-kills nbd-matrix nbd-leaks csi gc"): needs root
	@scripts/setup test
	scripts/test-long $(PART)

# The quick checks come first and the tests last.
check: fmt lint scripts-lint deny generated test test-k8s ## All that CI asks: format, lints, licences, generated files, tests

fmt: ## Is everything formatted?
	$(CARGO) fmt --all --check

# The second for the tests that a plain `cargo test` leaves out: --all-targets leaves them out, too.
lint: ## clippy, where a warning is an error
	$(CARGO) clippy --locked --all-targets -- --deny warnings
	$(CARGO) clippy --locked $$(awk '/^\[/ { name = "" } /^name = / { name = $$3 } /^test = false/ { print "--test", name }' Cargo.toml | tr -d '"') -- --deny warnings

scripts-lint: ## shellcheck on the scripts
	@scripts/setup check
	shellcheck .ci/run $$(grep -ls '^#!.*sh$$' scripts/* scripts/vm.d/*)

deny: ## Licences, advisories, sources and banned crates
	@scripts/setup check
	scripts/deny

generate: ## Writes man/ and completions/ anew
	$(CARGO) build --locked --quiet --bin zerofsctl
	rm -rf man completions
	$(CARGO_TARGET_DIR)/debug/zerofsctl generate man man
	$(CARGO_TARGET_DIR)/debug/zerofsctl generate completions completions

generated: ## Are man/ and completions/ what the program would write?
	@$(CARGO) build --locked --quiet --bin zerofsctl
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(CARGO_TARGET_DIR)/debug/zerofsctl generate man "$$fresh/man" && \
	$(CARGO_TARGET_DIR)/debug/zerofsctl generate completions "$$fresh/completions" && \
	diff -ru man "$$fresh/man" && diff -ru completions "$$fresh/completions" || \
	{ echo "generated files are out of date: run 'make generate' and commit the result" >&2; exit 1; }

bench: ## attach, memory and throughput beside their floors, in one run (ARGS="attach --rounds 3"): needs root
	@scripts/setup test
	$(CARGO) bench --locked --bench side_by_side -- $(ARGS)

# The bench runs where the module is, on a release build made here. MACHINE=debian CPUS=2: the stock kernel with two
# processors, in emulation.
MACHINE ?= uml
CPUS ?= 1
bench-nbd: ## The NBD transport beside nbd-client, in a machine that has it (ARGS="--rounds 3"): needs root
	@scripts/setup test vm
	@$(CARGO) bench --locked --bench side_by_side --no-run
	@echo "Load average of this machine: $$(cut -d' ' -f1-3 /proc/loadavg) before,"
	@ZEROFSCTL_VM_CPU=$$(($$(nproc) - 1)) ZEROFSCTL_VM_CPUS=$(CPUS) scripts/vm $(MACHINE) --name bench-nbd --memory 10G --timeout 10800 -- \
	"$$($(CARGO) bench --locked --quiet --bench side_by_side --no-run --message-format json | \
	sed -n 's/.*"name":"side_by_side".*"executable":"\([^"]*\)".*/\1/p')" nbd $(ARGS)
	@echo "$$(cut -d' ' -f1-3 /proc/loadavg) after."

# ARGS="--volumes 220 --objects 200000" for less.
bench-gc: ## gc-s3 beside s5cmd on a real MinIO, and far from a store that is never busy (ARGS="--rounds 3"): needs root
	@scripts/setup test bench
	@echo "Load average: $$(cut -d' ' -f1-3 /proc/loadavg) before,"
	$(CARGO) bench --locked --bench side_by_side -- gc $(ARGS)
	@echo "$$(cut -d' ' -f1-3 /proc/loadavg) after."

# Prints rounds, leaks and time (ROUNDS=200 for fewer).
ROUNDS ?= 1000
bench-rounds: ## 1,000 rounds of attach and detach on kernel NBD, half of them killed half-way: needs root
	@scripts/setup test vm
	ZEROFSCTL_ROUNDS=$(ROUNDS) ZEROFSCTL_VM_MEMORY=8G ZEROFSCTL_VM_TIMEOUT=14400 scripts/vm-test uml nbd_rounds

install: ## The program, its man pages and completions below PREFIX (/usr/local)
	$(CARGO) build --locked --release --bin zerofsctl
	install -Dm755 $(CARGO_TARGET_DIR)/release/zerofsctl $(DESTDIR)$(PREFIX)/bin/zerofsctl
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m644 man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's#/usr/local/#$(PREFIX)/#' deploy/systemd/zerofsctl-watch.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/zerofsctl-watch.service
	install -Dm644 completions/zerofsctl.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/zerofsctl
	install -Dm644 completions/_zerofsctl $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_zerofsctl
	install -Dm644 completions/zerofsctl.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/zerofsctl.fish

clean: ## Removes what was built here (not the tools, which all clones share)
	$(CARGO) clean
