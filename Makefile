# make demo: set up, generate data, train a point tracker, evaluate it and draw its tracks.
# make test: set up and run all tests.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test test-long fuzz stress lint bench

.venv/ready: requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/ready
	$(PY) bench/demo.py

test: .venv/ready
	$(PY) -m pytest -n 2 --dist loadgroup -m "not slow"

test-long: .venv/ready
	$(PY) -m pytest -m slow

fuzz: .venv/ready
	$(PY) tests/stress/fuzz.py --seconds 600

stress: .venv/ready
	set -e; for system in lbm stereo moge pi3 mvdiff; do $(PY) tests/stress/kill.py --system $$system --kills 50; done

lint: .venv/ready
	.venv/bin/ruff check .

bench: .venv/ready
	set -e; for system in lbm stereo moge pi3 mvdiff; do $(PY) bench/bench.py $$system; done
	$(PY) bench/checkpoint.py
