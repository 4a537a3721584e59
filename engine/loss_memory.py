"""When the output layer makes the gradients of a loss in the forward pass instead of keeping logits: engine/mcore/linear_ce.py does it and the
planner counts it. No torch here."""

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}     # logits at a time: what a core's cache holds; what fills a GPU
BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}    # logits held at a time where gradients are made in the forward pass


def rows_in(limit: dict[str, int], device: str, num_ids: int, itemsize: int) -> int:
    """Rows of num_ids logits of so many bytes each that `limit` has room for, one at least."""
    return max(1, limit[device] // (num_ids * itemsize))


def is_early(tokens: int, width: int, num_ids: int, itemsize: int, device: str, learns: bool = True) -> bool:
    """Are the logits of all tokens, and later the weight's gradient [num_ids, width], more than that gradient in fp32 from the beginning and one
    block? learns: does the weight?"""
    if tokens <= rows_in(BLOCK_BYTES, device, num_ids, itemsize):
        return False
    return not learns or (tokens + width) * itemsize > 4 * width
