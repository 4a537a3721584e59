"""Command-line tools that turn text into corpora: train_tokenizer, preprocess, merge, peek. Each starts without torch."""
