"""Every row of the parity table: a layout's losses, gradient norms and weights equal one rank's."""

import parity_table
import pytest


@pytest.mark.parametrize("row", parity_table.CASES, ids=str)
def test_layout_equals_one_rank(row):
    loss, norm, weights = parity_table.compare(row)
    assert max(loss, norm, weights) < parity_table.LIMIT, f"loss {loss:.1e}, gradient norm {norm:.1e}, weights {weights:.1e}"


def test_the_table_notices_a_wrong_loss():
    """Two micro-batches instead of four: the same samples, but a MoE balancing loss over other micro-batches."""
    import ranks

    row = parity_table.case("moe", 1, micro_batch=2)
    found = parity_table.difference(parity_table.reference("moe"), ranks.run(1, parity_table.train, "moe", {}, row.train, 1))
    assert max(found) > parity_table.LIMIT


def test_global_balancing_loss_over_dp():
    """With one micro-batch per rank the global loss has nothing to run over, and two dp ranks must equal one."""
    import ranks

    one = ranks.run(1, parity_table.train, "moe-global", {}, {"micro_batch": 8}, 1)
    two = ranks.run(2, parity_table.train, "moe-global", {}, {"micro_batch": 4}, 2)
    assert max(parity_table.difference(one, two)) < parity_table.LIMIT
