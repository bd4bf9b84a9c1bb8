# `make table` runs the main job, `make test` the tests; each makes its own .venv where there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: table seeds test lint clean

table: $(READY)  ## train full, dct and dct1d on 5,000 MNIST digits, then print and save the table
	$(BIN)/python recipes/mnist5k/prepare.py
	$(BIN)/vit-efficient table accuracy recipes/mnist5k/full.yaml recipes/mnist5k/dct.yaml recipes/mnist5k/dct1d.yaml \
		--runs runs/mnist5k --out runs/mnist5k

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
