# What a newcomer types. Each target does its own set-up.

.PHONY: demo test test-kernels start-python test-rust test-black-box test-sdk check-cuda bench bench-api bench-validation lint dashboard fixtures

# A real model learns from the chat rows in demo/; KEEP=1 leaves the server running.
demo:
	@scripts/packages.sh demo
	@python3 demo/demo.py

# Everything: the types of the cuda feature, unit tests, then the black-box tests.
test: start-python check-cuda test-rust test-black-box

# The tests' packages come down while the compiler works; who needs them waits for them.
start-python:
	@scripts/packages.sh test
	@{ scripts/test-python.sh; scripts/test-clients.sh; scripts/test-s3.sh; } >/dev/null 2>&1 &

test-rust:
	scripts/packages.sh test
	scripts/test-setup.sh
	cargo test --workspace

# The running binary, driven as users drive it. PYTEST_ARGS='-k page' runs a part.
test-black-box:
	scripts/packages.sh test
	cargo build --workspace --bins --examples
	"$$(scripts/test-setup.sh)" -m pytest tests $(PYTEST_ARGS)

# The official SDK's own tests of our part of the API, against a running server.
test-sdk:
	scripts/packages.sh test
	cargo build --workspace --bins --examples
	scripts/test-sdk.sh $(PYTEST_ARGS)

KERNEL_TESTS := ops::adamw::tests::both ops::attention::tests::grouped ops::attention::tests::a_segment_after \
	ops::gated_activation::tests::cpu_form ops::head::tests::weighted ops::linear::tests::dropout \
	ops::linear::tests::quantised ops::product::tests::products_side ops::rms_norm ops::token_nll::tests::few

# A GPU's kernels where there is no GPU, by Mesa's driver that computes on the CPU (Debian's package
# mesa-vulkan-drivers), in f32: one test of each operation, as a kernel takes it seconds to compile.
test-kernels:
	TUNESMITH_TEST_DEVICE=wgpu cargo test -p tunesmith-engine --features wgpu --lib -- $(KERNEL_TESTS)

# The features that no test builds type-check, cuda without a CUDA toolkit (about seven minutes the
# first time).
check-cuda:
	scripts/packages.sh test
	DOCS_RS=1 cargo check -p tunesmith --features cuda,otel

# Speed, memory and start-up beside PyTorch, TRL and unsloth, as ratios. BENCH_ONLY=lora runs a part.
bench:
	scripts/packages.sh test
	cargo build --release --workspace --bins --examples
	python3 bench/run.py $(BENCH_ARGS)

# The front-end beside pgbench, sha256sum, dd and a bare stream, as ratios. BENCH_ONLY=get runs a part.
bench-api:
	scripts/packages.sh demo
	scripts/test-model.sh SmolLM2-135M-Instruct scripts/fetch-smollm2.sh
	cargo build --release -p tunesmith-api -p tunesmith-core --examples
	python3 bench/api.py

# How fast a file of 100,000 rows is checked and its tokens counted, on one core.
bench-validation:
	scripts/test-setup.sh
	cargo run --release -p tunesmith-core --example validation_speed target/test-models/SmolLM2-135M-Instruct

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@command -v cargo-deny >/dev/null || \
		{ echo "cargo-deny is missing: cargo install cargo-deny --locked"; exit 1; }
	cargo deny --offline check bans licenses sources

# Rebuilds the web page; the built files are committed, since the binary embeds them.
dashboard:
	cd dashboard && npm ci --silent && npm run --silent build
	scripts/dashboard-digest.sh > dashboard/dist/sources.sha256

# Tiny models of each family with the numbers that Hugging Face computes for them, those of adapters,
# optimisers and schedules, and the GGUF files of the importer's tests; committed. The scripts beside
# these need packages that nothing else does, and say which.
fixtures:
	scripts/packages.sh test
	OMP_NUM_THREADS=1 "$$(scripts/test-setup.sh)" scripts/fixtures/families.py
	for script in adapters optimisation gguf_types gguf_variants; do \
		OMP_NUM_THREADS=1 "$$(scripts/test-setup.sh)" scripts/fixtures/$$script.py || exit 1; done
