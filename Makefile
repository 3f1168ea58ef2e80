# `make` explains itself. Everything runs in .venv, which the first target that needs it sets up.
PROFILE ?= laptop
WORKERS ?= 2
FIGURES := $(wildcard nbs/fig*.ipynb)
PY      := .venv/bin/python
STAMP   := .venv/.ready
PAPER   := $(PY) -m papermill
export PYTHON TORCH_INDEX CUDA

# A .venv that was moved or lost its Python is set up again.
$(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && [ -x $(PY) ] || rm -f $(STAMP))

.PHONY: help setup demo figures figures-check test battery bench weights docs readme export clean
.DEFAULT_GOAL := help

help:
	@echo 'fluogen: generative fluorescence microscopy, in notebooks.'
	@echo
	@echo '  make demo            set up .venv and run figure 4 (super-resolution): about 5 minutes on 2 cores'
	@echo '  make test            set up .venv and run the tests: under 10 minutes on 2 cores (WORKERS=$(WORKERS): test files at once)'
	@echo
	@echo '  make figures         every figure notebook, PROFILE=$(PROFILE) (smoke, laptop, gpu, paper) -> figures/'
	@echo '  make figures-check   run them apart and compare the numbers with the committed ones'
	@echo '  make battery         the reliability batteries with their full counts: about 10 minutes on 2 cores'
	@echo '  make bench           times and ratios of times beside their limits: a report, it never fails'
	@echo '  make weights         how the shipped weights were made, and how to make them again'
	@echo '  make docs            the notebooks as a web site -> site/index.html'
	@echo
	@echo '  make export          after editing a notebook in nbs/: write fluogen/ from nbs/, clean the notebooks'
	@echo '  make readme          after editing nbs/index.ipynb: write README.md'
	@echo '  make clean           remove what was built and run (keeps .venv and the committed figures)'
	@echo
	@echo 'Needs Python 3.11 or newer, make and git. Settings: PYTHON=python3.12, TORCH_INDEX=<index with another torch>.'

setup: $(STAMP)
	@echo "Ready. Next: make demo, or open a notebook: $(PY) -m jupyter lab nbs"

$(STAMP): pyproject.toml constraints.txt .ci/setup
	@.ci/setup
	@echo "$(CURDIR)" > $@

demo: $(STAMP)
	@test -f nbs/fig4_sr.ipynb || { echo 'demo: nbs/fig4_sr.ipynb is not in this checkout' >&2; exit 1; }
	@mkdir -p runs
	@$(PAPER) nbs/fig4_sr.ipynb runs/fig4_sr.ipynb -p profile laptop </dev/null
	@echo
	@echo 'Look at  figures/fig4_sr/laptop/figure.png   the figure'
	@echo '         figures/fig4_sr/laptop/claims.json  what was claimed, expected and measured'
	@echo '         runs/fig4_sr.ipynb                  the notebook as it ran'
	@echo 'Next:    $(PY) -m jupyter lab nbs/fig4_sr.ipynb   change a parameter and run it again'
	@echo '         .venv/bin/fluogen restore IN.tif OUT.tif --task sr   on an image of your own'

figures: $(STAMP)
	@mkdir -p runs
	@set -e; for nb in $(FIGURES); do echo "== $$nb, profile $(PROFILE)"; \
	  $(PAPER) $$nb runs/$$(basename $$nb) -p profile $(PROFILE) </dev/null; done
	@echo 'Look at figures/*/$(PROFILE)/figure.png and the claims beside them. Next: git diff --stat figures'

figures-check: $(STAMP)
	@mkdir -p runs/check
	@set -e; for nb in $(FIGURES); do echo "== $$nb, profile $(PROFILE)"; \
	  FLUOGEN_FIGURES="$(CURDIR)/runs/check" $(PAPER) $$nb runs/check/$$(basename $$nb) -p profile $(PROFILE) </dev/null; done
	@$(PY) -c 'import sys; from fluogen.report.compare import compare_folders; sys.exit(compare_folders())' figures runs/check --profile $(PROFILE)

# Independent test files on both cores, one thread each; notebooks one by one (tests/conftest.py).
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=10 </dev/null
	@echo 'All passed. Next: make demo, or make battery for the full counts.'

battery: $(STAMP)
	@OMP_NUM_THREADS=1 FLUOGEN_BATTERY=full $(PY) -m pytest -m battery -n $(WORKERS) --dist loadfile --durations=10 </dev/null
	@echo 'The batteries passed with their full counts.'

bench: $(STAMP)
	@$(PY) benchmarks/times.py </dev/null
	@echo 'A limit that was missed on a busy machine means little: run it again, or a part: $(PY) benchmarks/times.py lessons'

weights: $(STAMP)
	@echo 'The weights on this machine, each with a card (recipe, data, seed, minutes, hardware, scores):'
	@.venv/bin/fluogen weights
	@echo
	@echo 'How those that are shipped were made, in this order; every command resumes where it stopped (checkpoints in runs/):'
	@.venv/bin/fluogen train --list
	@echo
	@echo 'What the figures compare, measured again:'
	@.venv/bin/fluogen benchmark --list
	@echo
	@echo '--minutes is the time limit of one call; on a GPU the same commands take larger steps.'

docs: $(STAMP)
	@$(PY) .ci/docs.py site
	@$(PY) -m mkdocs build --quiet -f build/mkdocs.yml
	@echo 'Open site/index.html in a browser.'

readme: $(STAMP)
	@$(PY) .ci/docs.py readme
	@echo 'README.md was made from nbs/index.ipynb. Next: git diff README.md'

export: $(STAMP)
	@$(PY) -c 'from nbdev.doclinks import nbdev_export; nbdev_export()'
	@$(PY) -c 'from nbdev.clean import nbdev_clean; nbdev_clean()'
	@echo 'fluogen/ was written from nbs/. Next: git diff --stat, make test'

clean:
	@rm -rf build dist site _docs _proc runs/check .pytest_cache .hypothesis figures/*/smoke
	@find fluogen tests nbs -name __pycache__ -prune -exec rm -rf {} +
	@echo 'Removed what was built. Kept: .venv, runs/ (executed notebooks, checkpoints), figures/. Next: make test'
