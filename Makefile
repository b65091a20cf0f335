# make demo         the whole method on embedded digits, in two minutes on two cores
# make test         lint and all tests
# make reproduce    the runs behind docs/evidence.md: CIFAR-10, three seeds, about two hours on two
#                   cores (SIZE=medium: all images, days; SIZE=full: the published protocol, for a
#                   GPU; FLAGS=...: more flags, such as --status)
# make gpu          on a CUDA device: tests, benchmark, and as much of the published protocol as half
#                   an hour allows (MINUTES=30); again: resumes it
# make clean        remove demo/
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 30
SIZE ?= small
RUN = $(VENV)/bin/python

# What makes the demo small: nine of the digits in three tasks, a narrow network, few epochs, small
# batches, few exemplars, and few but large prunings. Four leave 0.5^4 = 6.25 %.
TRAIN = --dataset digits --classifiers 3 --classes_per_classifier 3 --width 8 --batch_size 32 \
    --epochs 5 --decreasing_lr 3,4 --lr 0.02 --exemplars 10 --unlabel_num 6
TICKETS = $(TRAIN) --percent 0.5 --iter_epochs 1

.PHONY: demo demo-TD demo-BU reproduce gpu test lint clean

# TD and BU at once: so narrow a network gains nothing from a second thread. Each script resumes or
# finds its work done.
demo: $(VENV)/installed
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 demo-TD demo-BU
	@echo; $(RUN) -m tools.report demo/TD demo/BU --out demo

# Silent, as BU shows its progress
demo-TD:
	@TQDM_DISABLE=1 $(RUN) main_TD.py $(TICKETS) --prune_scheduler 1,1,2 --save_dir demo/TD > /dev/null

# The second command retrains the last bottom-up ticket, task-rewound: its mask on the dense weights
# of task 2.
demo-BU:
	$(RUN) main_BU.py $(TICKETS) --max_iter_prun 4 --base_sparsity 80 --save_dir demo/BU
	$(RUN) main_train.py $(TRAIN) --save_dir demo/BU --state 3 \
	    --weight demo/BU/task2_best_model.pt --mask demo/BU/mask-3.pt

reproduce: $(VENV)/installed
	$(RUN) -m tools.reproduce --size $(SIZE) $(FLAGS)

# A test that fails does not stop the rest; when the time is up, timeout ends with status 124.
gpu: $(VENV)/installed-dev
	-$(RUN) -m pytest -q -m device --device cuda
	-test -f gpu/bench.json || $(RUN) benchmarks/bench.py --device cuda --out gpu/bench.json
	timeout $(MINUTES)m $(RUN) -m tools.reproduce --size full --out gpu $(FLAGS) || test $$? = 124
	$(RUN) -m tools.reproduce --size full --out gpu --report

test: $(VENV)/installed-dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadscope --no-loadscope-reorder

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

$(VENV)/installed-dev: requirements.txt requirements-extra.txt requirements-dev.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/installed

clean:
	rm -rf demo
