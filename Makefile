# `make` lists the targets. What takes more than a line is in hack/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build lint fmt crds image cluster cluster-down install load demo demo-down test unit integration e2e bench simulate fuzz soak clean

CACHE := $(or $(WEFT_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft)
CLUSTER := tests/e2e/cluster/cluster
FLEET_PROGRAMS := etcd kube-apiserver kube-controller-manager kube-scheduler kwok
export PATH := $(CACHE)/bin:$(PATH)

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/' | expand -t 15

build: ## Build everything, for debugging
	cargo build --locked --workspace --all-targets

lint: ## Formatting, clippy, dependencies, scripts, charts, generated files; writes nothing
	hack/lint

fmt: ## Format the Rust code
	cargo fmt --all

crds: ## Write crds/ and charts/weft-crds from the types
	hack/crds

image: ## Build the two images into target/images, and print their sizes
	hack/image

cluster: ## Start a cluster for trials; leaves ./kubeconfig, says how to use it
	$(CLUSTER) up --kubeconfig kubeconfig

cluster-down: ## Take the trial cluster away
	$(CLUSTER) down
	rm -f kubeconfig

install: image ## Install the charts on the trial cluster, with images of this checkout
	hack/install

load: ## Put a program of yours on the trial cluster, without Docker; without arguments it says how
	@BINARY='$(BINARY)' FOLDER='$(FOLDER)' IMAGE='$(IMAGE)' RUN='$(subst ','\'',$(RUN))' PACKAGES='$(PACKAGES)' hack/load-program

demo: ## A cluster, the operator, two services, their relays, a saga at work; says first how long it takes
	hack/demo

demo-down: ## Take away whatever the demo made
	hack/demo --down

test: ## Every test there is, the end-to-end ones on a cluster of their own; about 20 minutes once all is built
	hack/test

unit: ## Tests that need nothing but the code
	hack/test unit

integration: ## Tests against real processes of PostgreSQL and the brokers
	hack/test integration

e2e: ## Tests on a cluster; ONLY=NAME runs the tests whose name has NAME in it
	hack/test charts e2e

bench: ## Measure; ONLY=NAME runs one benchmark (fleet: of FLEET objects, 1000 unless it says otherwise)
	hack/prerequisites test
	$(CLUSTER) build nats-server $(if $(filter-out fleet,$(ONLY)),,$(FLEET_PROGRAMS))
	cargo bench --locked --bench '$(or $(ONLY),*)'

simulate: ## Drive the saga and the relay through SEEDS random schedules (default 100000)
	WEFT_SEEDS=$(or $(SEEDS),100000) cargo test --release --locked --lib simulation -- --nocapture

fuzz: ## Give the decoder of the replication stream SEEDS messages that no server sends (default 10000000)
	WEFT_SEEDS=$(or $(SEEDS),10000000) cargo test --release --locked --lib replication::fuzz -- --nocapture

soak: ## RUNS faults (default 1000) in each mode of the relay, under load, in an order that SEED repeats; nothing may be lost
	hack/prerequisites test
	$(CLUSTER) build nats-server
	WEFT_SOAK_RUNS=$(or $(RUNS),1000) WEFT_SEED=$(SEED) cargo test --release --locked --test integration relay_soak -- --nocapture --test-threads=1

clean: ## Remove what was built in the checkout (the cache outside of it stays)
	cargo clean
	rm -rf .run
