"""ITDA: what becomes an atom, the fit over a cache, and how alike two such dictionaries are."""

import json

import pytest
import torch
from torch import Tensor

from activations.errors import InputError
from activations.run import Run
from sae import checkpoint, load_sae
from sae.architectures.itda import ITDASAE, ITDAConfig
from sae.atoms import jaccard, labels_of, layer_matching
from sae.base import ConfigError
from sae.settings import Training
from sae.train import train, train_together
from tests.tiny import HOOK, planted_rows, planted_run

D_IN = 16


@pytest.fixture
def rows() -> Tensor:
    return planted_rows(4000, D_IN, 40, 3, signed=False)[0]


@pytest.fixture
def run(tmp_path, rows) -> Run:
    return planted_run(tmp_path / "run", rows)


def settings(*, n_tokens: int = 4000, architecture: str = "itda", **sizes) -> Training:
    sizes = {"d_sae": 2000, "k": 3, **sizes}
    return Training(architecture=architecture, hook=HOOK, sizes=sizes, n_tokens=n_tokens, batch=128, matmul="float32")


def filled(rows: Tensor, **sizes) -> ITDASAE:
    sae = ITDASAE(ITDAConfig(**{"d_in": rows.shape[1], "d_sae": 200, "k": 3, **sizes}))
    sae.fit_batch(rows, torch.arange(2 * len(rows)).view(-1, 2))
    return sae.fitted()


def test_rows_become_atoms_by_hand():
    # Each row after the first 32 is seen beside 32 atoms at least, so these are all one look: e1, e2, -e1 and e1 again.
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [-5.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    sae = filled(rows, k=2)
    assert sae.W_dec.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert sae.labels.tolist() == [[0, 1], [2, 3]]
    assert sae.encode(torch.tensor([[4.0, -7.0, 1.0]])).tolist() == [[4, -7]]


def test_tau_is_the_squared_error_a_dimension_that_is_let_pass():
    first = torch.eye(3)[:1].repeat(32, 1)
    later = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.6, 0.0]])  # .25 / 3 and .36 / 3 are left
    sae = filled(torch.cat([first, later]), k=1, tau=0.1)
    torch.testing.assert_close(sae.W_dec, torch.stack([first[0], later[1] / later[1].norm()]))


def test_with_tau_0_every_row_it_saw_is_reconstructed_exactly(rows):
    sae = filled(rows[:150], tau=0.0)
    torch.testing.assert_close(sae.reconstruct(rows[:150]), rows[:150], atol=1e-5, rtol=1e-5)
    # Rows that were made of three atoms already did not become one.
    again = filled(torch.cat([rows[:150], rows[:150].mul(2)]), tau=0.0)
    assert again.d_sae == sae.d_sae <= 150


def test_a_smaller_tau_makes_more_atoms_and_a_smaller_error(rows):
    made = [filled(rows[:2000], tau=tau, d_sae=2000) for tau in (0.05, 0.02, 0.005)]
    sizes = [sae.d_sae for sae in made]
    errors = [(sae.reconstruct(rows) - rows).square().mean().item() for sae in made]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    assert errors == sorted(errors, reverse=True)


def test_it_is_fitted_from_a_cache_in_the_order_of_the_text(run, rows):
    folder = train(run, settings(tau=0.2))
    sae, labels = load_sae(folder), labels_of(folder)
    assert isinstance(sae, ITDASAE)
    assert 32 < len(labels) == sae.d_sae < 2000
    assert sae.statistics is not None
    document, row = labels.T  # contexts of 16, spread over 40 documents
    assert torch.equal(document, row // 16 % 40)
    assert (row % 16 > 0).all()
    assert torch.equal(row, row.unique())
    torch.testing.assert_close(sae.W_dec, torch.nn.functional.normalize(rows[row], dim=1))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["n_atoms"] == sae.d_sae
    assert lines[-1]["fvu"] < 0.3


def test_killed_and_resumed_the_fit_ends_in_the_same_bytes(run, monkeypatch):
    whole, save, kills = train(run, settings(tau=0.2), name="whole"), checkpoint.save, []

    def save_and_die(*args):
        save(*args)
        kills.append(args[2].step)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(run, settings(tau=0.2), name="broken", checkpoint_seconds=0.0)
    monkeypatch.setattr(checkpoint, "save", save)
    broken = train(run, settings(tau=0.2), name="broken")
    assert len(set(kills)) == 3
    for name in ("sae_weights.safetensors", "atoms.safetensors", "statistics.safetensors", "train.jsonl"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_a_full_dictionary_ends_the_fit(run):
    folder = train(run, settings(d_sae=40, tau=0.0))
    assert load_sae(folder).d_sae == 40
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[-1])["tokens"] < 1000


def test_it_can_be_wanted_beside_a_dictionary_that_is_trained(run):
    made = train_together(run, {"a": settings(tau=0.2), "b": settings(architecture="topk")})
    assert load_sae(made["a"].folder).architecture == "itda"
    assert load_sae(made["b"].folder).architecture == "topk"
    assert made["a"].n_tokens > 3000
    assert train_together(run, {"a": settings(tau=0.2)})["a"].n_tokens == 0  # finished before


def test_what_a_fit_has_no_use_for_is_refused():
    with pytest.raises(InputError, match="itda is fitted in one pass, without gradient: leave out lr"):
        Training(architecture="itda", hook=HOOK, sizes={"d_sae": 4, "k": 1}, n_tokens=100, batch=10, lr=1e-3)
    with pytest.raises(ConfigError, match="d_in=4, the rank"):
        ITDAConfig(d_in=4, d_sae=20, k=5)


def test_similarity_is_the_share_of_atoms_in_common():
    a = torch.tensor([[0, 1], [0, 2], [3, 1]])
    b = torch.tensor([[0, 1], [3, 1], [9, 9], [8, 8]])
    assert jaccard(a, b) == 2 / 5
    assert jaccard(a, a) == 1
    assert layer_matching([a, b], [a, b]) == 1
    assert layer_matching([a, b], [b, a]) == 0
    assert layer_matching([a, b], [b, b]) == 0.5


def test_labels_of_another_kind_of_dictionary_are_refused(run):
    with pytest.raises(InputError, match="expected an itda dictionary"):
        labels_of(train(run, settings(architecture="topk", n_tokens=512)))
