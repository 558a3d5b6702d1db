PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-output
MINUTES ?= 10
DEMO_ARGS ?=
GPU_ARGS ?=
TEST_ARGS ?=
# What the environment was made from: when one of them changes, it is brought up to date.
STAMP := $(VENV)/.made-from-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.PHONY: demo test test-faults test-engines check bench gpu wheels dist model-cards docs audit fuzz clean
.DEFAULT_GOAL := test

# torch first and by its exact version, so that a build for CPUs that pip has been shown is taken: any later request
# could bring the newest build for CUDA instead, several gigabytes.
$(STAMP):
	@echo "Creating $(VENV), which takes a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[report,dev,docs]'
	rm -f $(VENV)/.made-from-*
	touch $@

# Poison, train, clean, measure: writes demo-output/report.html. `make demo DEMO_ARGS="--trigger patch --seed 1"`.
demo: $(STAMP)
	$(BIN)/hf-robust-clip demo --output-dir $(OUT) $(DEMO_ARGS)

# The fast lane, in less than a minute and a half: linters, types, and the tests that take no training.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not training and not faults" $(TEST_ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

# Kills trainings, their workers, and one of two processes: a quarter of an hour. `make test` kills a few.
test-faults: $(STAMP)
	$(BIN)/python tests/faults/many.py
	$(BIN)/python -m pytest -m faults -s tests/faults

# DeepSpeed on two processes without a GPU, with every stage of ZeRO: a few minutes. `make test` looks at one stage from
# then on. torch is there by its exact version, which keeps pip from taking another.
test-engines: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pytest -m engines tests/trainers/test_engines.py $(TEST_ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/step_cost.py --json benchmarks/results/step_cost.json
	$(BIN)/python benchmarks/peers.py --json benchmarks/results/peers.json
	$(BIN)/python benchmarks/pool_lookup.py --json benchmarks/results/pool_lookup.json
	$(BIN)/python benchmarks/evaluation_cost.py --json benchmarks/results/evaluation_cost.json
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/data_path.py --json benchmarks/results/data_path.json
	$(BIN)/python benchmarks/mixture_fit.py --json benchmarks/results/mixture_fit.json
	$(BIN)/python benchmarks/profile_step.py --json benchmarks/results/profile_step.json
	$(BIN)/python benchmarks/scoring_pass.py --json benchmarks/results/scoring_pass.json
	$(BIN)/python benchmarks/split_at_scale.py --json benchmarks/results/split_at_scale.json
	$(BIN)/python benchmarks/scaling.py --json benchmarks/results/scaling.json
	$(BIN)/python benchmarks/endurance.py --json benchmarks/results/endurance.json
	$(BIN)/python benchmarks/cost_model.py --json benchmarks/results/cost_model.json
	$(BIN)/python benchmarks/pages.py

# What a GPU can decide, in some minutes: `make gpu MINUTES=8`. On a bare machine without a network, run the script by
# itself, with the wheels that `make wheels` has fetched on a machine with the same Python.
gpu: $(STAMP)
	$(BIN)/python scripts/gpu.py --minutes $(MINUTES) --json benchmarks/results/gpu.json $(GPU_ARGS)

wheels: $(STAMP)
	$(BIN)/python scripts/gpu.py --fill wheels

# The wheel and the source distribution, in dist/: checked, and the wheel used in an environment of its own.
dist: $(STAMP)
	$(BIN)/python scripts/dist.py

# The reference cards in model_cards/, one for each defence, with the runs that they are made from.
model-cards: $(STAMP)
	$(BIN)/python scripts/model_cards.py

# The documentation, in site/: open site/index.html. mkdocs-material tells of another builder at each build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# bandit on our own code, and known vulnerabilities of the packages in constraints.txt. Those come from PyPI: where it does
# not answer, that is an error, since pip-audit would otherwise find nothing in packages it knows nothing of.
audit: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'bandit' 'pip-audit'
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml hf_robust_clip scripts benchmarks
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# Ten minutes for each of the readers of manifests, settings and studies: `make fuzz MINUTES=1`.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(BIN)/python scripts/fuzz.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) $(OUT) site build dist wheels *.egg-info .pytest_cache .ruff_cache .mypy_cache
