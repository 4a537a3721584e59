"""A part of tests/layout_matrix.py: each axis changes both ways, dense and MoE, in fp32 and in bf16."""

import layout_matrix
import pytest
import ranks
from layout_matrix import LIMIT, PAIRS, Matrix, grouped


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("cells", grouped(PAIRS), ids=lambda cells: f"{cells[0].model} {cells[0].precision} to {cells[0].new}")
def test_what_one_layout_saved_another_loads_bit_for_bit_and_trains_on(matrix, cells):
    for cell, difference in matrix.loaded(cells).items():
        assert difference < (LIMIT if cell.precision == "fp32" else 2e-2), f"{cell}: {difference:.1e}"


# --- master copies that another name or another precision stands for -------------------------------------------------------


def save_as_before(folder):
    """A run in bf16 with ZeRO-1, whose master copies were once stored as `param`."""
    from engine.mcore import optim_state

    optim_state.MASTER = "param"
    try:
        layout_matrix.save("tied", "bf16", "dp2 zero1", folder)
    finally:
        optim_state.MASTER = "fp32_param"


def masters_that_differ(folder, precision, layout):
    """After loading: parameters whose master copy (in fp32 the weight itself) is not what is stored as that; how many were compared."""
    import torch

    from engine.mcore import checkpoint, optim_state, stream

    network, _ = layout_matrix.network("tied", precision, layout)
    where = checkpoint.find(folder)
    checkpoint.load(network, where)
    metadata, sharded = stream.read_metadata(where), optim_state._by_data(checkpoint._model_state(network))
    pairs = [(weight, weight) for chunk in network.chunks for weight in chunk.parameters()]
    if precision == "bf16":
        pairs = [(weight, main) for part in network.optimizer.chained_optimizers for weight, main, _ in optim_state._entries(part)]
    found, num = [], 0
    for weight, main in pairs:
        piece = sharded[id(weight)]
        if hasattr(piece, "global_shape"):  # matrices that a factory cuts are left out
            sizes = (*[1] * piece.prepend_axis_num, *piece.local_shape)
            stored = stream.read(where, metadata, f"optimizer.state.param.{piece.key}", tuple(piece.global_offset), sizes).view(main.shape)
            is_rounded = main.dim() > 1 and torch.equal(main, main.bfloat16().float())
            found += [piece.key] if is_rounded or not torch.equal(stored, main) else []
            num += 1
    return found, num


def test_master_copies_of_an_earlier_name_are_found_and_are_the_weights_of_fp32(tmp_path):
    ranks.run(2, save_as_before, str(tmp_path))
    for num_ranks, precision, layout in ((1, "bf16", "1"), (1, "fp32", "1"), (2, "fp32", "dp2 zero1")):
        for found, num in ranks.run(num_ranks, masters_that_differ, str(tmp_path), precision, layout):
            assert num > 20 and not found, (precision, layout)
