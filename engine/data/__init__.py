"""The data path: from .idx/.bin files on disk to micro-batches of torch tensors.

indexed (files) -> pretraining (samples of one corpus) -> blend (a mixture) -> loader (micro-batches of one rank).
Nothing is imported here, so that tools which only read files start without torch.
"""
