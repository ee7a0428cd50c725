"""Options of a training become settings that its architecture can have."""

import pytest

from activations.errors import InputError
from app.recipe import training


def test_k_may_be_a_fraction_where_a_batch_shares_it_and_nowhere_else():
    made = training({"arch": "batchtopk", "k": 6.5, "d_sae": 64}, hook="h", d_in=16)
    assert made.sizes["k"] == 6.5
    assert training({"arch": "topk", "k": 6.0, "d_sae": 64}, hook="h", d_in=16).sizes["k"] == 6
    with pytest.raises(InputError, match=r"k=6.5 is no whole number: topk keeps exactly k latents a token\."):
        training({"arch": "topk", "k": 6.5, "d_sae": 64}, hook="h", d_in=16)
