# make demo and make test set themselves up from a bare clone: they make their own virtual environment.
# The index serves torch with CUDA (several GB). For a CPU-only build install torch and torchvision into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo_output
FUZZ_SECONDS ?= 60
SEED ?= 1

.PHONY: help demo test test-thorough test-slow test-random test-anomalib lint bench faults bench-builtin wheel docs fuzz mutation coverage audit clean

help:
	@echo "make demo   score sample images and print a table (ANOMALYDINO_ASSETS: MVTec images instead)"
	@echo "make test   run the tests (25 minutes on two busy cores)"
	@echo "make test-thorough  the longer ones (half an hour); CI runs both"
	@echo "make lint   ruff and mypy"
	@echo "make bench  every measurement, and one table of verdicts (needs ANOMALYDINO_ASSETS; two and a half hours)"
	@echo "make faults kill what can be killed in every stage, and compare with undisturbed runs"
	@echo "make bench-builtin  side by side with anomalib's own AnomalyDINO (needs ANOMALYDINO_ASSETS)"
	@echo "make docs   these pages as a site, build/site; warnings are errors"
	@echo "make fuzz   each fuzz target for FUZZ_SECONDS (60)"
	@echo "make audit  known vulnerabilities of the pinned versions (needs the index's vulnerability service)"
	@echo "make mutation  mutants of the method and of the store, and which of them no test notices"
	@echo "make coverage  branch coverage of both packages by all tests"
	@echo "make test-random  the tests in an order drawn with SEED (1)"
	@echo "make test-slow  what both leave out: clusters, submitted jobs, further kills"
	@echo "make test-anomalib  the anomalib tests at both ends of the supported range"

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' && pins='-c constraints.txt' || pins=''; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$pins -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/anomalydino demo --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not thorough"

test-thorough: $(STAMP)
	$(BIN)/python -m pytest -m "thorough and not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-random: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[random-order]'
	$(BIN)/python -m pytest -m "not slow" -p randomly --randomly-seed=$(SEED)

test-anomalib: $(STAMP)
	$(BIN)/nox -f tests/noxfile.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# OFFICIAL and MUSC: checkouts of dammsi/AnomalyDINO and xrli-U/MuSc, outside of here; without them their lines are missing.
bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run_all.py --out bench_output $(if $(OFFICIAL),--official $(OFFICIAL)) $(if $(MUSC),--musc $(MUSC))
	@echo "pixel metrics need finished runs: see tests/benchmarks/pixel_metrics.py"

faults: $(STAMP)
	$(BIN)/python tests/faults/fault_matrix.py
	$(BIN)/python tests/benchmarks/reproducibility.py
	$(BIN)/python tests/benchmarks/repeated_defects.py

bench-builtin: $(STAMP)
	$(BIN)/python tests/benchmarks/compare_builtin.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation

docs: $(STAMP)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' && pins='-c constraints.txt' || pins=''; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$pins -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	set -e; for target in decoding manifest bank configuration settings_file; do \
	$(BIN)/python tests/fuzz/run.py $$target --seconds $(FUZZ_SECONDS); done

# One thread: mutmut forks, which torch's threads do not survive. Without plugins: looking for them takes longer than most
# of the tests that a mutant runs.
mutation: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutation]'
	rm -rf mutants
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m mutmut run
	$(BIN)/python -m mutmut results

coverage: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[coverage]'
	COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/python -m coverage erase
	COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

# --strict: a package that could not be looked up is a failure, not silence. A virtual environment of its own.
audit:
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'; }
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants .coverage*
