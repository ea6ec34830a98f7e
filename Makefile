# Everything runs in one environment, .venv, made by whichever target comes first. Needs Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# threads that wait should sleep: with another busy process, spinning ones make tiny networks thirty times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lab e2e soak readme run hooks clean
demo: $(STAMP)          ## a small network learns from a large one: the comparison `scenes`, about five minutes
	$(BIN)/kdnotes_compare --recipe scenes --out demo

test: $(STAMP)          ## notebooks in sync and clean, every notebook executed, all tests
	$(BIN)/python tools/test.py

lab: $(STAMP)           ## JupyterLab on the front page
	$(BIN)/jupyter lab nbs/index.ipynb

e2e: $(STAMP)           ## the front page and a notebook in a real browser (needs chromium)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[e2e]'
	$(BIN)/python tests/lab_e2e.py

soak: $(STAMP)          ## what takes long: kills at random moments, several processes, many seeds
	KDNOTES_LEDGER=1 $(BIN)/python -m pytest -q -m soak tests

readme: $(STAMP)        ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

run: $(STAMP)           ## fill the outputs of all notebooks
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_nbs.py

hooks:                  ## git hooks: clean notebooks and a package in sync before every commit; notebook merges
	git config core.hooksPath tools/hooks
	git config merge.nbdev-merge.driver '.venv/bin/nbdev_merge %O %A %B %P'

clean:
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .hypothesis demo

$(STAMP): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
