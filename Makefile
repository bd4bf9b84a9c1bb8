# `make table` runs the main job, `make test` the tests; each makes its own .venv where there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: table table-seeds test quick lint clean

MNIST5K := $(patsubst %,recipes/mnist5k/%.yaml,full dct dct1d)
MNIST5K_OTHERS := $(patsubst %,recipes/mnist5k/%.yaml,linformer pool subsample nystrom performer window)

table: $(READY)  ## train full, dct and dct1d on 5,000 MNIST digits, then print and save the table
	$(BIN)/python recipes/mnist5k/prepare.py
	$(BIN)/vit-efficient table accuracy $(MNIST5K) --runs runs/mnist5k

table-seeds: $(READY)  ## the table that is committed: all mechanisms, three seeds each
	$(BIN)/python recipes/mnist5k/prepare.py
	$(BIN)/vit-efficient table accuracy $(MNIST5K) $(MNIST5K_OTHERS) --seeds 0 1 2 --runs runs/mnist5k --out recipes/mnist5k

test: $(READY)  ## a process for each core, one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

quick: $(READY)  ## those that neither compile nor start processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m 'not compiled and not subprocess and not distributed'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## what is made anew; runs/ is not
	rm -rf $(VENV)
