"""A part of tests/layout_matrix.py: each axis changes both ways, dense and MoE, in fp32 and in bf16."""

import pytest
from layout_matrix import LIMIT, PAIRS, Matrix, grouped


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("cells", grouped(PAIRS), ids=lambda cells: f"{cells[0].model} {cells[0].precision} to {cells[0].new}")
def test_what_one_layout_saved_another_loads_bit_for_bit_and_trains_on(matrix, cells):
    for cell, difference in matrix.loaded(cells).items():
        assert difference < (LIMIT if cell.precision == "fp32" else 2e-2), f"{cell}: {difference:.1e}"
