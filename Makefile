# Every target may be repeated. `make PYTHON=python3.12 install` takes another Python.
PYTHON ?= python3
PRESET ?= refmojig
SEEDS  ?= 0, 1, 2
BENCHED ?= refmojig refcocog_umd_b16 refcocog_umd_l14
VENV   := .venv
PY     := $(VENV)/bin/python
RUN    := $(PY) -m papermill -k python3 --no-progress-bar --stdout-file - --stderr-file -

# A notebook's kernel is that of .venv, whatever else is installed.
export JUPYTER_PREFER_ENV_PATH = 1

.PHONY: help install data train pretrain ladder studies benchmark test outputs lab export site assignments clean

help:
	@echo 'make install    .venv with everything in it (at most 10 minutes)'
	@echo 'make train      install, build RefMoji, train in two stages into runs/$(PRESET) (20 minutes on two cores)'
	@echo 'make test       install, and run the tests; notebooks whose outputs are those of today are not run again (8 minutes on two cores)'
	@echo 'make test ALL=1 the same with every notebook (10 minutes on two cores)'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo 'make export     notebooks -> risclip/, cleaned notebooks, README.md'
	@echo 'make outputs    run the notebooks whose outputs are of other code or data, and keep what comes out'
	@echo 'make pretrain   train the small CLIP again (an hour and a half on two cores, minutes on a GPU)'
	@echo 'make ladder     train and score every rung with three seeds into data/ladder/ (2 hours on two cores; SEEDS=7 takes another)'
	@echo 'make studies    the open choices, and a CLIP without its alignment, beside the ladder (2 hours on two cores)'
	@echo 'make benchmark  time the model beside the bare CLIP into data/benchmarks/ (half an hour on two cores, with nothing beside it)'
	@echo 'make site       the course as web pages into site/ (a few minutes)'
	@echo 'make assignments  the exercises without their solutions into assignments/; what is there is left alone'
	@echo 'make clean      remove .venv, caches and generated data; runs/ stays'

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { \
	  echo "risclip needs Python 3.11 or newer, and '$(PYTHON)' is not: try for example  make $(or $(MAKECMDGOALS),install) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; } || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: settings.ini setup.py constraints.txt | $(PY)
	$(PY) -m pip install -e '.[dev]' -c constraints.txt
	@touch $@

install: $(VENV)/installed

data: install
	$(PY) -c 'from risclip.refmoji import refmoji_folder; print(refmoji_folder())'

train: data
	@mkdir -p runs/$(PRESET)
	$(RUN) nbs/runs/train.ipynb runs/$(PRESET)/train.ipynb -p preset $(PRESET)

pretrain: install
	@mkdir -p runs/pretrain
	$(RUN) nbs/runs/pretrain.ipynb runs/pretrain/colours.ipynb -p preset colours -p folder runs/pretrain/colours
	$(RUN) nbs/runs/pretrain.ipynb runs/pretrain/kinds.ipynb -p preset kinds -p folder runs/pretrain/kinds -p start runs/pretrain/colours/model

ladder: data
	@mkdir -p runs/ladder
	$(RUN) nbs/runs/ladder.ipynb runs/ladder/ladder.ipynb -p preset ladder -y 'seeds: [$(SEEDS)]'

studies: data
	@mkdir -p runs/ladder
	$(RUN) nbs/runs/ladder.ipynb runs/ladder/studies.ipynb -p preset ladder -p what studies

benchmark: data
	@mkdir -p runs/benchmark
	for preset in $(BENCHED); do $(RUN) nbs/runs/benchmark.ipynb runs/benchmark/$$preset.ipynb -p preset $$preset || exit 1; done

test: data
	$(if $(ALL),ALL=1 )OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadgroup --durations 15

outputs: data
	$(PY) tools/execute.py

lab: install
	$(PY) -m jupyter lab nbs

export: install
	$(PY) tools/install_cells.py
	$(VENV)/bin/nbdev_export
	$(VENV)/bin/nbdev_clean
	$(PY) tools/readme.py
	@$(PY) tools/stamps.py || true

$(VENV)/site: settings.ini constraints.txt | install
	$(PY) -m pip install -e '.[site]' -c constraints.txt
	@touch $@

site: install $(VENV)/site
	$(PY) tools/site_pages.py site

assignments: install
	$(PY) tools/assignments.py

clean:
	rm -rf $(VENV) build dist site _proc *.egg-info .pytest_cache .hypothesis data/images/refmoji data/refmoji data/refmoji+ data/refmojig
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
