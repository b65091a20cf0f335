# make demo         the whole method on the embedded digits, in a few minutes on a CPU
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

# What makes the demo small: the digits, a narrow network, few epochs, small batches, hence a
# higher learning rate, few queried images, and fewer prunings when a ticket re-grows (it gains
# (1 - density) 0.8^16 = 2.5 % of the weights instead of 0.3 %).
MODEL = --dataset digits --width 8 --batch_size 64
TRAIN = $(MODEL) --epochs 10 --decreasing_lr 7,9 --lr 0.05
TICKETS = $(TRAIN) --unlabel_num 3 --iter_epochs 1

.PHONY: demo reproduce gpu test lint clean

# Each script resumes or finds its work done. The fourth command retrains the bottom-up ticket of
# task 3, task-rewound: its mask on the dense weights of task 2.
demo: $(VENV)/installed
	$(RUN) main_CIL.py $(TRAIN) --unlabel_num 3 --save_dir demo/CIL
	$(RUN) main_TD.py $(TICKETS) --save_dir demo/TD
	$(RUN) main_BU.py $(TICKETS) --max_iter_prun 16 --save_dir demo/BU
	$(RUN) main_train.py $(TRAIN) --save_dir demo/BU --state 3 \
	    --weight demo/BU/task2_best_model.pt --mask demo/BU/mask-3.pt
	$(RUN) test.py --pretrained demo/TD/task6_best_model.pt --pruned
	$(RUN) test.py --pretrained demo/BU/task5_best_prun_model.pt --pruned
	@echo; $(RUN) -m tools.report demo/CIL demo/TD demo/BU --out demo

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
