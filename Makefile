# `make demo` and `make test` each work alone on a fresh clone with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := padding,token_budget,static_shapes,splicing,chunking,packing

.PHONY: demo test test-slow test-integrations lint bench gpu clean

demo: $(VENV)/demo.installed
	@mkdir -p report
	$(BIN)/seqbatch simulate --corpus ud_en_ewt --strategies $(DEMO) --plot report/ud_en_ewt.png
	$(BIN)/seqbatch simulate --corpus librispeech_devtest_clean --chunk-size 200 --strategies $(DEMO) \
		--plot report/librispeech_devtest_clean.png
	PYTHONPATH=. $(BIN)/python -m experiments.demo

test: $(VENV)/test.installed lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -m slow

# Training with the frameworks that the README names; their packages are many, so this is apart from `make test`.
test-integrations: $(VENV)/integrations.installed
	$(BIN)/python -m pytest tests/integrations

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/test.installed $(VENV)/integrations.installed
	PYTHONPATH=. $(BIN)/python -m experiments.planning.run
	PYTHONPATH=. $(BIN)/python -m experiments.packing.run
	PYTHONPATH=. $(BIN)/python -m experiments.strategies.run
	PYTHONPATH=. $(BIN)/python -m experiments.pairs.run
	PYTHONPATH=. $(BIN)/python -m experiments.rnn_speed.run
	PYTHONPATH=. $(BIN)/python -m experiments.rnn_speed.bnlstm --device cpu
	PYTHONPATH=. $(BIN)/python -m experiments.step_graph.run
	PYTHONPATH=. $(BIN)/python -m experiments.step_graph.plot
	PYTHONPATH=. $(BIN)/torchrun --standalone --nproc-per-node 2 -m experiments.pipeline_lm.speed
	PYTHONPATH=. $(BIN)/python -m experiments.pipeline_lm.plot
	PYTHONPATH=. $(BIN)/python -m experiments.loader_speed.run
	PYTHONPATH=. $(BIN)/python -m experiments.prediction.run
	PYTHONPATH=. $(BIN)/python -m experiments.lm_strategies.speed
	PYTHONPATH=. $(BIN)/python -m experiments.asr_lengths.run
	PYTHONPATH=. $(BIN)/python -m experiments.sru_classification.run
	PYTHONPATH=. $(BIN)/python -m experiments.sequential_mnist.run
	PYTHONPATH=. $(BIN)/python -m experiments.char_lm.run
	PYTHONPATH=. $(BIN)/python -m experiments.attentive_reader.run
	PYTHONPATH=. $(BIN)/python -m experiments.translation.speed
	PYTHONPATH=. $(BIN)/python -m experiments.translation.run

# Needs a CUDA device and no network: uses the Python at hand, with torch and triton as they are installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q -p no:cacheprovider -W default -m gpu tests/test_rnn_gpu.py tests/test_loader_gpu.py tests/test_compare_gpu.py tests/test_pipeline_gpu.py
	PYTHONPATH=. $(PYTHON) -m experiments.rnn_speed.run --device cuda
	PYTHONPATH=. $(PYTHON) -m experiments.rnn_speed.bnlstm --device cuda
	PYTHONPATH=. $(PYTHON) -m experiments.prediction.run --device cuda --dtype bfloat16 --seconds 12
	PYTHONPATH=. $(PYTHON) -m experiments.lm_strategies.speed --device cuda --dtype bfloat16 --turns 3
	PYTHONPATH=. $(PYTHON) -m experiments.pipeline_lm.predict --device cuda

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "seqbatch needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.installed: $(VENV)/bin/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[plot]"
	@touch $@

$(VENV)/test.installed: $(VENV)/bin/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $@

$(VENV)/integrations.installed: $(VENV)/bin/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,integrations]"
	@touch $@

clean:
	rm -rf $(VENV) report
