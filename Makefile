# make demo    the whole method on the embedded digits, in a few minutes on a CPU
# make test    lint and all tests
# make reproduce    the README's evidence: CIFAR-10, three seeds, in about two hours on two cores
#                   (FULL=1: the published protocol, for a GPU; FLAGS=...: see reproduce.py --help)
# make soak    kill runs at random moments, 120 times, and compare with undisturbed ones
# make clean   remove demo/ and .venv/
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# What makes the demo small: the digits, a narrow network, few epochs, small batches, hence a
# higher learning rate, few pool images to query, and fewer prunings when a ticket re-grows (it
# gains (1 - density) 0.8^16 = 2.5 % of the weights instead of 0.3 %).
DEMO = --dataset digits --width 8 --epochs 10 --decreasing_lr 7,9 --lr 0.05 --batch_size 64 \
       --unlabel_num 3
TICKETS = --iter_epochs 1
REGROWTH = --max_iter_prun 16

.PHONY: demo reproduce test lint soak clean

demo: demo/TD.done demo/BU.done demo/TR.done
	@echo; echo "test.py on the result of main_TD, pruned:"
	@$(RUN) test.py $(DEMO) --pretrained demo/TD/task6_best_model.pt --pruned
	@echo "test.py on the last dense model of main_BU:"
	@$(RUN) test.py $(DEMO) --pretrained demo/BU/task5_best_model.pt
	@echo; $(RUN) report.py demo/TD demo/BU --out demo

demo/TD.done: Makefile | $(VENV)/installed
	@test -e demo/TD/run.json || rm -rf demo/TD   # of a version that could not go on
	$(RUN) main_TD.py $(DEMO) $(TICKETS) --save_dir demo/TD
	@touch $@

demo/BU.done: Makefile | $(VENV)/installed
	@test -e demo/BU/run.json || rm -rf demo/BU
	$(RUN) main_BU.py $(DEMO) $(TICKETS) $(REGROWTH) --save_dir demo/BU
	@touch $@

# the bottom-up ticket of task 3, task-rewound: its mask on the dense weights of task 2
demo/TR.done: demo/BU.done
	$(RUN) main_train.py $(DEMO) --save_dir demo/BU --state 3 \
	    --weight demo/BU/task2_best_model.pt --mask demo/BU/mask-3.pt
	@touch $@

reproduce: | $(VENV)/installed
	$(RUN) reproduce.py $(if $(filter 1,$(FULL)),--full) $(FLAGS)

test: $(VENV)/installed-dev lint
	$(RUN) -m pytest -q

soak: $(VENV)/installed-dev
	$(RUN) tests/soak.py --kills 120

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	    'Python 3.10 or newer is needed; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/installed

clean:
	rm -rf demo .venv
