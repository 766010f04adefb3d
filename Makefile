# make demo: toy videos -> shards -> base, mid, trajectories, regression, distillation -> sampled videos of a few-step student.
# make demo-base: the same with a longer Base stage alone.   make test: the tests.
# All first make a virtual environment and install into it. DEMO=quick runs the same road with few steps.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= full
RUN    ?= runs/demo/$(shell date +%Y%m%d-%H%M%S)

RUN    := $(RUN)
HELIOS := $(VENV)/bin/python -m helios_train

SAMPLE := sample.steps=25 sample.guidance=3 sample.solver=euler
ifeq ($(DEMO),quick)
TRAIN  := data.toy.clips=16 data.held_out=4 trainer.max_steps=8 optimizer.warmup=2 watch.every=4 watch.sample_steps=3
SAMPLE := sample.steps=3 sample.solver=euler
SHORT  := data.toy.clips=16 data.held_out=4 trainer.max_steps=4 optimizer.warmup=2 watch.every=0 watch.sample=false \
          'chain.pairs="pairs.count=2 pairs.sections=1 pairs.steps=3"' 'chain.sample="sample.count=1 sample.sections=1"'
endif

# With a second thread that waits busily, a core in use elsewhere slows a step twentyfold.
export OMP_WAIT_POLICY = PASSIVE

CAPTIONS := a red circle on a blue background,a green circle on a black background,a yellow circle on a blue background,$\
            a magenta circle on a white background,a red circle on a white background,a green circle on a blue background

.PHONY: demo demo-base test

demo: $(VENV)/installed
	$(HELIOS) experiment=demo run_dir=$(RUN) $(SHORT)

demo-base: $(VENV)/installed
	$(HELIOS) experiment=toy_base run_dir=$(RUN) $(TRAIN)
	$(HELIOS) task=merge experiment=toy_base init=$(RUN) merge.output=$(RUN)/merged
	$(HELIOS) task=sample experiment=toy_base init=$(RUN)/merged sample.output=$(RUN)/samples 'sample.prompt=[$(CAPTIONS)]' $(SAMPLE)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[test,dev]"
	touch $@
