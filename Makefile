# The targets of this project; `make` alone lists them. Each sets up what it needs.
#
#   PYTHON=python3.11   the Python that .venv is made with, 3.11 or later
#   FEEDBACK_NB_DATA=…  a folder with full data sets, passed on to everything that runs

PYTHON ?= python3
SHELL := /bin/sh
PY := .venv/bin/python
READY := .venv/.ready
export TQDM_DISABLE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup book test quick record lab docs bench readme check dist clean

help: ## this list
	@echo 'make TARGET, where TARGET is one of'
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-8s %s\n", $$1, $$2}' Makefile
	@echo 'Settings: PYTHON=python3.11 (for .venv), FEEDBACK_NB_DATA=folder (full data sets).'

book: $(READY) ## execute the notebooks that changed and write the offline book, _book/index.html
	@$(PY) scripts/book.py

test: $(READY) ## the notebooks' own tests, then pytest
	@$(PY) scripts/test.py

quick: $(READY) ## pytest in two minutes: no process is started or killed, no page is built
	@$(PY) scripts/test.py --quick

record: $(READY) ## what is recorded and what is stale; CHAPTER=31 HOURS=2 works it off
	@$(PY) scripts/record.py

lab: $(READY) ## JupyterLab on nbs/index.ipynb
	@$(PY) -m jupyter lab nbs/index.ipynb

docs: $(READY) ## the Quarto site in _docs/ (needs quarto on the PATH)
	@$(PY) scripts/docs.py

bench: $(READY) ## every benchmark and one table of ratios and bounds; CHECK=1 fails above a bound
	@$(PY) benchmarks $(if $(CHECK),--check)

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(PY) scripts/readme.py

check: $(READY) ## is feedback_nb/ what the notebooks export, are they clean, described and run
	@$(PY) scripts/check_notebooks.py

dist: $(READY) ## wheel and sdist in dist/, checked by twine
	@rm -rf dist build
	@$(PY) -m build --outdir dist .
	@$(PY) -m twine check --strict dist/*

setup: $(READY) ## only make .venv with the pinned versions

clean: ## remove everything that was made, but not .venv
	rm -rf _book _docs _proc dist build .pytest_cache .hypothesis .ruff_cache nbs/nbdev.yml
	rm -rf *.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# .ready is removed first and written last. Without it nothing in .venv is trusted, so a set-up that was interrupted starts again from nothing.
$(READY): constraints.txt settings.ini setup.py
	@command -v "$(PYTHON)" >/dev/null || { echo 'There is no $(PYTHON) on the PATH. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3.11'; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The pinned set needs Python 3.11 or later (numpy 2.4 and scipy 1.17 do), and $(PYTHON) is `"$(PYTHON)" -V 2>&1`. Name another: make PYTHON=python3.11."; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo '$(PYTHON) has no venv module. On Debian and Ubuntu it is the package python3-venv; or name another: make PYTHON=python3.11'; exit 1; }
	@if [ -f $@ ]; then rm $@; else echo 'Making .venv (once, some minutes) ...'; "$(PYTHON)" -m venv --clear .venv; fi
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m pip check
	@touch $@
