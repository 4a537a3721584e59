# The quickstart's steps, included by the Makefile of the repository root. A step runs when its output is missing or older than its inputs.

QS := examples/quickstart
WORK := $(QS)/work
RUN := $(WORK)/run
# the machine's cores, shared by the two ranks; at most 4 each, since the matrices are small
THREADS = $(shell $(PY) -c 'import os; print(min(4, max(1, (os.cpu_count() or 2) // 2)))')

quickstart: $(WORK)/sample.txt
	@echo; echo "== done: $(RUN)/loss.png  $(RUN)/metrics.jsonl  $(RUN)/hf"
	@cat $(WORK)/report.txt
	@echo; cat $(WORK)/sample.txt

$(WORK)/corpus/train.jsonl: $(QS)/corpus.py | $(VENV)/.installed
	@echo "== 1/7 corpus: the standard library's source"
	$(PY) $(QS)/corpus.py --output-dir $(@D)

$(WORK)/tokenizer/tokenizer.json: $(WORK)/corpus/train.jsonl
	@echo "== 2/7 tokenizer: byte-level BPE, trained on the training files only"
	$(PY) data_tools/train_tokenizer.py --input $< --vocab-size 6144 --output $(@D)
	@touch $@

$(WORK)/data/%_text_document.idx: $(WORK)/tokenizer/tokenizer.json
	@echo "== 3/7 tokens: $*.jsonl -> .bin/.idx"
	@mkdir -p $(@D)
	$(PY) data_tools/preprocess.py --input $(WORK)/corpus/$*.jsonl --output-prefix $(WORK)/data/$* --tokenizer hf:$(WORK)/tokenizer --append-eod
	@touch $@

# A changed configuration or corpus starts afresh; an interrupted run goes on from its last checkpoint.
$(WORK)/.fresh: $(QS)/pretrain.yaml $(WORK)/data/train_text_document.idx $(WORK)/data/valid_text_document.idx
	rm -rf $(RUN)
	@touch $@

$(WORK)/.trained: $(WORK)/.fresh
	@echo "== 4/7 pretraining on two CPU ranks, TP=2 with sequence parallelism"
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/torchrun --nproc-per-node 2 launch/pretrain.py $(QS)/pretrain.yaml
	@touch $@

$(WORK)/report.txt: $(WORK)/.trained $(QS)/report.py
	@echo "== 5/7 loss curve"
	$(PY) $(QS)/report.py $(RUN) --train-data $(WORK)/data/train_text_document --valid-data $(WORK)/data/valid_text_document --output $@ >/dev/null

$(RUN)/hf/config.json: $(WORK)/.trained
	@echo "== 6/7 export to a Hugging Face folder, logits checked"
	rm -rf $(RUN)/hf
	$(PY) launch/convert.py to-hf $(RUN)/checkpoints $(RUN)/hf
	@touch $@

$(WORK)/sample.txt: $(WORK)/report.txt $(RUN)/hf/config.json $(QS)/sample.py
	@echo "== 7/7 a sample, by transformers from that folder"
	$(PY) $(QS)/sample.py $(RUN)/hf --output $@ >/dev/null
