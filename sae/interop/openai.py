"""OpenAI's sparse_autoencoder: one .pt file with a state dict. Read only.

TopK models standardise each row first (and no others do: their loader tells it by the activation's name). That is our
`mlsae` with eps 1e-5: z comes out as theirs times the row's standard deviation. ReLU models are our `standard`.
Source: openai/sparse_autoencoder, sparse_autoencoder/model.py.
"""

from pathlib import Path

from activations.errors import InputError
from sae.base import SAE
from sae.interop.made import centred, make, one_of, standardised, whole
from sae.interop.tensors import read_pt

EPS = 1e-5


def read(path: Path) -> SAE:
    """The dictionary in a .pt file, or in a folder with one. Raises InputError."""
    path = path if path.is_file() else next(iter(sorted(path.glob("*.pt"))), path)
    tensors, others = read_pt(path)
    activation = one_of(others.get("activation", "ReLU"), "activation", ("ReLU", "TopK"), path)
    d_sae, d_in = tensors.sizes("encoder.weight")
    bias = tensors.take("pre_bias", d_in)
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T,
        "b_enc": tensors.take("latent_bias", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T,
        "b_dec": bias,
    }
    tensors.ignore("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    tensors.finish()
    if activation == "ReLU":
        return make("standard", {}, weights, {})
    state = others.get("activation_state_dict")
    if not isinstance(state, dict) or state.get("postact_fn") != "ReLU":
        raise InputError(f"{path} has a TopK without ReLU: expected activation_state_dict with k and postact_fn ReLU.")
    weights["b_enc"] = centred(weights["W_enc"], weights["b_enc"], -bias)
    return standardised(weights, whole(state, "k", path), EPS, {})
