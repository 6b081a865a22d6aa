# caption_nb: `make demo` is the place to start; `make help` lists the rest.
# PYTHON picks the interpreter, VENV the environment's folder, PIP_FLAGS goes to pip.
PYTHON    ?= $(shell for p in python3.11 python3.12 python3.10 python3; do $$p -c '' 2>/dev/null && { command -v $$p; break; }; done)
VENV      ?= .venv
PIP_FLAGS ?=
WORKERS   ?= 2
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test notebooks pytest lab docs bench readme clean install install-dev

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: install ## install, train a captioner on drawn scenes (about three minutes), print where its record lies
	$(BIN)/caption-nb demo $(ARGS)

test: notebooks pytest ## install what tests need, run every notebook's tests, then pytest

notebooks: install-dev ## run the tests in the notebooks (those in nbs/experiments are run by papermill, in pytest)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/nbdev_test --n_workers $(WORKERS) --skip_folder_re '^([_.]|experiments$$)' --timing

pytest: install-dev ## run the tests in tests/, a file at a time on each of WORKERS cores
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lab: $(VENV)/.installed-lab ## JupyterLab on the notebooks, starting at the home page
	$(BIN)/jupyter lab index.ipynb

docs: install-dev ## build the site into _site/ (DOCS_RUN=folder shows that run instead of a small new one)
	$(BIN)/python docs/build.py

bench: install-dev ## side-by-side benchmarks, e.g. make bench ARGS='metrics --quick'
	$(BIN)/python -m bench $(or $(ARGS),--all)

readme: install-dev ## make README.md from index.ipynb
	$(BIN)/python docs/readme.py

clean: ## delete what was built here; runs and the environment stay
	rm -rf _site _proc build dist .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# One pip command resolves everything, torch and torchvision together: their releases come in pairs.
# The stamps make a second `make` start at once; they are as old as the files that name the requirements.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No Python found: install Python 3.10 or newer, or say make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo '$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo '$(PYTHON) cannot make a virtual environment: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }

$(VENV)/.installed: settings.ini setup.py | $(BIN)/python
	@echo 'Installing caption_nb into $(VENV) (a few minutes the first time)'
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-lab: settings.ini setup.py | $(BIN)/python
	@echo 'Installing caption_nb and JupyterLab into $(VENV)'
	$(PIP) -e '.[lab]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: settings.ini setup.py | $(BIN)/python
	@echo 'Installing caption_nb and its development tools into $(VENV)'
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $(VENV)/.installed-lab $@
