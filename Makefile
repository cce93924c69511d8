# `make` alone lists the tasks. Each installs what it needs first (scripts/setup), by name and version.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
export ZEROFSCTL_TOOLS ?= $(HOME)/.cache/zerofsctl/tools
# cargo's own default is `target` here; both cargo and the recipes below follow this variable.
export CARGO_TARGET_DIR ?= $(CURDIR)/target

.DEFAULT_GOAL := help
.PHONY: help demo build test test-k8s test-long check fmt lint scripts-lint deny generate generated bench install clean

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
	@scripts/setup test
	$(CARGO) test --locked

test-k8s: ## The tests with a real Kubernetes API server, which the first run builds: needs root
	@scripts/setup test k8s
	$(CARGO) test --locked --test gc_k8s

# The same tests, with more cases of each property and more rounds of each crash test.
test-long: export ZEROFSCTL_CASES ?= 5000
test-long: export ZEROFSCTL_ROUNDS ?= 30
test-long: export PROPTEST_CASES ?= 5000
test-long: test ## All tests with many more cases and rounds: takes an hour or more

# The quick checks come first and the tests last.
check: fmt lint scripts-lint deny generated test test-k8s ## All that CI asks: format, lints, licences, generated files, tests

fmt: ## Is everything formatted?
	$(CARGO) fmt --all --check

lint: ## clippy, where a warning is an error
	$(CARGO) clippy --locked --all-targets -- --deny warnings

scripts-lint: ## shellcheck on the scripts
	@scripts/setup check
	shellcheck .ci/run $$(grep -l '^#!.*bash' scripts/*)

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

install: ## The program, its man pages and completions below PREFIX (/usr/local)
	$(CARGO) build --locked --release --bin zerofsctl
	install -Dm755 $(CARGO_TARGET_DIR)/release/zerofsctl $(DESTDIR)$(PREFIX)/bin/zerofsctl
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m644 man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -Dm644 completions/zerofsctl.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/zerofsctl
	install -Dm644 completions/_zerofsctl $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_zerofsctl
	install -Dm644 completions/zerofsctl.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/zerofsctl.fish

clean: ## Removes what was built here (not the tools, which all clones share)
	$(CARGO) clean
