"""The example of a stage outside the tree: found by its path, parametrised by stage_options, equal in every layout."""

import ranks
import numpy as np
import pytest
from training import merged, on_ranks

FOCAL = {"stage": "examples.own_stage.focal:Focal", "stage_options": {"gamma": 2.0}}


def test_gamma_zero_is_pretraining(raw_run, tmp_path):
    plain = on_ranks(1, raw_run)
    focal = on_ranks(1, merged(raw_run, FOCAL, {"stage_options": {"gamma": 0.0}, "run": {"dir": str(tmp_path / "focal")}}))
    assert [line["loss"] for line in focal] == pytest.approx([line["loss"] for line in plain], rel=1e-6)
    assert [line["nll"] for line in focal] == pytest.approx([line["loss"] for line in plain], rel=1e-6)


@pytest.mark.parametrize("layout", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}, {"cp": 2}, {}], ids=str)
def test_it_is_the_same_in_every_layout(raw_run, tmp_path, layout):
    raw_run = merged(raw_run, FOCAL)
    one = on_ranks(1, raw_run)
    two = on_ranks(2, merged(raw_run, {"parallel": layout, "run": {"dir": str(tmp_path / "two")}}))
    for name in ("loss", "nll", "grad_norm"):
        assert np.allclose([line[name] for line in two], [line[name] for line in one], rtol=1e-5), name
    assert one[0]["loss"] < one[0]["nll"]


def test_a_stage_that_is_not_there_is_named(raw_run):
    for stage in ("examples.own_stage.focal:Vocal", "examples.none:Focal"):
        with pytest.raises(ranks.RankError, match=f"ValueError: stage={stage} cannot be imported"):
            on_ranks(1, merged(raw_run, {"stage": stage}))
