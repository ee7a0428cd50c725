"""Absorption, polysemous words, dark matter, proxies and effects, on planted cases whose numbers are known."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from activations.errors import InputError
from activations.model import Model
from activations.splice import replace
from data.senses import sense_contexts
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evals import absorption as first_letter
from sae.evals.ablation import ablation, spread, spreads
from sae.evals.absorption import absorption_of, first_letters
from sae.evals.controls import projection
from sae.evals.dark_matter import dark_matter
from sae.evals.explainability import firings, kurtosis, proxies
from sae.evals.labelled import rows_of_last
from sae.evals.polysemy import pairs_of, polysemy_of, prompts, scores
from sae.evals.probing import split
from sae.evals.subject import SenseContext
from sae.sparse import to_sparse
from tests.tiny import HOOK, planted_rows, planted_run, spaced_tokenizer, tiny_model, tiny_tokenizer


class Scripted(TopKSAE):
    """A dictionary whose latents on known rows are written down."""

    def __init__(self, x: torch.Tensor, z: torch.Tensor, W_dec: torch.Tensor) -> None:
        super().__init__(TopKConfig(d_in=x.shape[1], d_sae=z.shape[1], k=1))
        self.x, self.z = x, z
        self.W_dec.data = W_dec

    def encode_sparse(self, x):
        return to_sparse(self.z[torch.cdist(x, self.x).argmin(dim=1)])


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


N_LETTERS, N_WORDS, D = 22, 30, 80


@pytest.fixture(scope="module")
def words():
    """Rows of 22 letters' words: the letter's direction, 4 long, and the word's own; a third of the words, absorbed,
    have a latent of their own that is the letter's direction too, and the letter's latent is silent on them."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    letters = np.repeat(np.arange(N_LETTERS), N_WORDS)
    own = normalize(torch.randn(len(letters), D - N_LETTERS, generator=generator), dim=1) @ basis[N_LETTERS:]
    x = 4 * basis[letters] + own
    absorbed = np.arange(len(letters)) % 3 == 0
    z = torch.zeros(len(letters), N_LETTERS + int(absorbed.sum()))
    z[np.flatnonzero(~absorbed), letters[~absorbed]] = 4.0
    z[np.flatnonzero(absorbed), N_LETTERS + np.arange(int(absorbed.sum()))] = 4.0
    rows = torch.cat([basis[:N_LETTERS], (4 * basis[letters] + own)[absorbed] / 4])
    honest = torch.zeros_like(z)
    honest[np.arange(len(letters)), letters] = 4.0
    return x, letters, Scripted(x, z, rows), Scripted(x, honest, rows)


def test_planted_absorption_is_found_at_its_rate_and_an_honest_dictionary_has_none(words):
    x, letters, absorbing, honest = words
    found = values(absorption_of(x, letters, absorbing, honest))
    assert found["absorption.letters"] == N_LETTERS
    assert found["absorption.probe_f1"] > 0.95
    tested = [split(letters == letter, seed=0)[1] for letter in range(N_LETTERS)]
    expected = [(rows[letters[rows] == letter] % 3 == 0).mean() for letter, rows in enumerate(tested)]
    assert found["absorption.full"] == pytest.approx(np.mean(expected))
    assert 0.2 < np.mean(expected) < 0.7
    assert found["absorption.fraction"] == pytest.approx(found["absorption.full"])
    assert found["absorption.splitting"] == 1
    assert found["control.random.absorption.full"] == found["control.random.absorption.fraction"] == 0


def test_two_latents_of_a_letter_are_a_split_and_no_absorption(words):
    x, letters, absorbing, honest = words
    z = torch.zeros(len(letters), 2 * N_LETTERS)
    z[np.arange(len(letters)), 2 * letters + np.arange(len(letters)) % 2] = 4.0
    basis = honest.W_dec[:N_LETTERS].detach()
    doubled = Scripted(x, z, basis.repeat_interleave(2, dim=0))
    found = values(absorption_of(x, letters, doubled, absorbing))
    assert found["absorption.splitting"] == 2
    assert found["absorption.full"] == 0


def test_a_letter_half_carried_by_another_latent_has_that_fraction(words):
    x, letters, absorbing, honest = words
    z = torch.cat([torch.zeros(len(letters), N_LETTERS), torch.full((len(letters), 1), 0.0)], dim=1)
    z[np.arange(len(letters)), letters] = 2.0
    # The last latent fires on each word of letter 0 and carries the other half of its direction.
    z[letters == 0, -1] = 2.0
    basis = honest.W_dec[:N_LETTERS].detach()
    halves = Scripted(x, z, torch.cat([basis, basis[:1]]))
    found = values(absorption_of(x, letters, halves, absorbing))
    assert found["absorption.fraction"] == pytest.approx(0.5 / N_LETTERS, abs=0.002)


def test_where_the_models_probes_are_too_weak_no_number_is_given(words):
    _, letters, absorbing, honest = words
    noise = torch.randn(len(letters), D, generator=torch.Generator().manual_seed(1))
    found = absorption_of(noise, letters, absorbing, honest)
    assert set(found) == {"absorption.letters", "absorption.probe_f1"}
    assert found["absorption.letters"].value < 20
    assert "too few: the model's own probes are too weak" in found["absorption.letters"].definition


def test_words_are_single_tokens_in_lower_case_and_stand_behind_examples(monkeypatch):
    monkeypatch.setattr(first_letter, "FEWEST", 1)
    model = Model("tiny", "none", tiny_model(), tiny_tokenizer())
    listed = [b" apple", b" Apple", b" ant", b"berry", b" birch", b" b\xc3\xa4ren", b" cedar2", b" corn"]
    fill = [f" z{a}{b}xx".encode() for a in "aeiou" for b in "aeiou"]
    monkeypatch.setattr(model, "token_bytes", lambda: [*listed, *fill])
    sequences, letters = first_letters(model, seed=0)
    ends = {int(sequence[-1]) for sequence in sequences}
    assert ends <= {0, 4, 7, *range(len(listed), len(listed) + len(fill))}
    assert len(sequences) == len(letters)
    assert (letters[[int(sequence[-1]) >= len(listed) for sequence in sequences]] == 25).all()


CONTEXTS = [SenseContext("bat", "animal", "a"), SenseContext("bat", "animal", "b"), SenseContext("bat", "club", "c")]
CONTEXTS += [SenseContext("key", "lock", "d"), SenseContext("key", "music", "e")]


def test_pairs_are_of_one_word_and_know_whether_the_sense_is_one():
    pairs = pairs_of(CONTEXTS)
    assert list(zip(pairs.first, pairs.second, pairs.same, pairs.word, strict=True)) == [
        (0, 1, True, 0),
        (0, 2, False, 0),
        (1, 2, False, 0),
        (3, 4, False, 1),
    ]


def test_scores_of_four_pairs_by_hand():
    found = scores(np.array([True, True, False, False]), pairs_of(CONTEXTS), "pairs", seed=0)
    assert values(found) == pytest.approx(
        {
            "polysemy.recall": 1,
            "polysemy.specificity": 2 / 3,
            "polysemy.accuracy": 5 / 6,
            "polysemy.precision": 1 / 2,
            "polysemy.f1": 2 / 3,
        }
    )


def test_a_latent_for_each_sense_is_right_everywhere_and_one_for_the_word_at_chance():
    contexts = [SenseContext(f"w{i}", s, str(c)) for i in range(6) for s in "ab" for c in range(3)]
    senses = sorted({(each.word, each.sense) for each in contexts})
    x = torch.randn(len(contexts), 8, generator=torch.Generator().manual_seed(0))
    by_sense, by_word = torch.zeros(len(contexts), 13), torch.zeros(len(contexts), 13)
    for row, each in enumerate(contexts):
        by_sense[row, senses.index((each.word, each.sense))] = 1
        by_word[row, int(each.word[1:])] = 1
    by_sense[:, 12] = 9  # fires everywhere, and strongest
    rows = torch.randn(13, 8)
    good, plain = Scripted(x, by_sense, rows), Scripted(x, by_word, rows)
    density = torch.zeros(13)
    density[12] = 1
    good.statistics = _statistics(density)
    found = values(polysemy_of(x, contexts, good, plain))
    assert found["polysemy.accuracy"] == found["polysemy.f1"] == 1
    assert found["control.random.polysemy.accuracy"] == 0.5
    good.statistics = None
    assert values(polysemy_of(x, contexts, good, plain))["polysemy.accuracy"] == 0.5


def test_rows_where_nothing_fires_are_like_no_other():
    x = torch.randn(len(CONTEXTS), 8)
    silent = Scripted(x, torch.zeros(len(CONTEXTS), 3), torch.randn(3, 8))
    found = values(polysemy_of(x, CONTEXTS, silent, silent))
    assert (found["polysemy.recall"], found["polysemy.specificity"]) == (0, 1)


def _statistics(density):
    from sae.base import Statistics

    return Statistics(density, density, density, 10, 1.0, 1.0)


def test_the_shipped_sentences_hold_their_word_and_two_senses_twice():
    rows = sense_contexts()
    assert len({context for *_, context in rows}) == len(rows) >= 60
    for word in {word for word, *_ in rows}:
        mine = [(sense, context) for each, sense, context in rows if each == word]
        assert sorted(sense for sense, _ in mine) == sorted([sense for sense, _ in mine[::2]] * 2)
        assert len({sense for sense, _ in mine}) == 2
        assert all(f" {word} " in context.replace(".", " ").replace(",", " ") for _, context in mine)


def test_words_that_are_taken_apart_are_left_out():
    model = Model("tiny", "none", tiny_model(), spaced_tokenizer())
    contexts = [SenseContext("w7", "a", "w1 w2"), SenseContext("w7 w8", "b", "w3")]
    sequences, kept = prompts(model, contexts)
    assert kept == contexts[:1]
    assert [sequence.tolist() for sequence in sequences] == [[1, 2, 0, 7]]


@pytest.fixture
def cache(tmp_path):
    return planted_run(tmp_path / "run", planted_rows(6000, 8, 12, 3, signed=False)[0]).activations(HOOK)


def test_an_error_that_is_linear_in_x_is_linear_whole(cache):
    half = projection(torch.zeros(8), torch.eye(8))
    half.W_dec.data *= 0.5
    found = values(dark_matter(half, cache))
    assert found["dark_matter.linear_r2"] == pytest.approx(1, abs=1e-5)
    assert found["dark_matter.nonlinear_fvu"] == pytest.approx(0, abs=1e-5)
    assert found["dark_matter.linear_fvu"] > 0.2


def test_an_error_of_random_sign_is_not_linear_and_no_error_has_no_part(cache):
    part = values(dark_matter(projection(torch.zeros(8), torch.eye(8)), cache))
    assert part["dark_matter.linear_r2"] == pytest.approx(0, abs=1e-3)
    assert part["dark_matter.nonlinear_fvu"] == pytest.approx(0, abs=1e-9)
    noisy = _Noisy(TopKConfig(d_in=8, d_sae=8, k=1))
    found = values(dark_matter(noisy, cache))
    assert abs(found["dark_matter.linear_r2"]) < 0.1
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])
    fvu = 8 * 0.25 / float((rows - rows.mean(dim=0)).square().sum(dim=1).mean())
    assert found["dark_matter.nonlinear_fvu"] == pytest.approx(fvu, rel=0.15)


class _Noisy(TopKSAE):
    def reconstruct(self, x):
        return x + 0.5 * torch.randint(0, 2, x.shape, generator=torch.manual_seed(int(x.abs().sum()))) * 2 - 0.5


def test_dark_matter_wants_ten_tokens_a_dimension(tmp_path):
    run = planted_run(tmp_path / "one", torch.randn(64, 4), n_docs=2)
    with pytest.raises(InputError, match="fits 4 numbers from 30 tokens of every other of 2 all documents"):
        dark_matter(projection(torch.zeros(4), torch.eye(4)), run.activations(HOOK))


def test_firings_are_those_of_the_dense_codes_with_their_tokens_and_sequences(cache):
    sae = TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2))
    sae.initialise(torch.zeros(1, 8), seed=0)
    latents, tokens, sequences, sizes = firings(sae, cache, n_rows=600, batch=100)
    rows = torch.cat([cache.rows(i)[cache.mask(i)] for i in range(cache.n_shards)])[:600]
    z = sae.encode(rows).detach()
    assert torch.equal(torch.bincount(latents, minlength=16), (z != 0).sum(dim=0))
    assert sizes.sum() == pytest.approx(float(z.sum()), rel=1e-5)
    assert int(sequences.max()) == 600 // 15 == len(sequences.unique())  # position 0 of 16 is left out
    ids = torch.cat([cache.tokens(i).ids[cache.mask(i)] for i in range(cache.n_shards)])[:600]
    assert torch.equal(tokens[latents == 3], ids[z[:, 3] != 0].long())


def test_a_latent_of_one_token_has_all_its_share_there_and_repeats_are_counted(tmp_path):
    token = torch.arange(3200) % 101
    rows = torch.nn.functional.one_hot(token % 2, 2).float()
    rows[token == 7] = torch.tensor([0.0, 5.0])
    run = planted_run(tmp_path / "run", torch.cat([rows, (token == 9).float()[:, None]], dim=1))
    sae = TopKSAE(TopKConfig(d_in=3, d_sae=3, k=3))
    sae.W_dec.data = sae.W_enc.data = torch.eye(3)
    found = proxies(sae, run.activations(HOOK), None, n_rows=3200)
    n = found["token_share"].n
    assert n == 3
    cache = run.activations(HOOK)
    ids = torch.cat([cache.tokens(i).ids[cache.mask(i)] for i in range(cache.n_shards)])
    size = torch.where(ids == 7, 5.0, 1.0)
    odd = ids % 2 == 1
    shares = [
        float(torch.bincount(ids[~odd]).max() / (~odd).sum()),
        float(size[ids == 7].sum() / size[odd].sum()),
        1.0,
    ]
    assert found["token_share"].value == pytest.approx(np.mean(shares), rel=1e-4)
    assert found["repeats"].value > 1


def test_kurtosis_is_that_of_the_logits():
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=5, k=1))
    sae.W_dec.data = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    unembed = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    logits = (sae.W_dec @ unembed).detach().double()
    centred = logits - logits.mean(dim=1, keepdim=True)
    expected = (centred**4).mean(dim=1) / (centred**2).mean(dim=1) ** 2 - 3
    assert torch.allclose(kurtosis(sae, unembed, chunk=2).double(), expected, atol=1e-4)


def test_spread_is_the_share_of_logits_that_move():
    one, all_alike, noise = torch.zeros(3, 4, 1001)
    one[1, 5] = -3
    all_alike[:, ::2], all_alike[:, 1::2] = 2, -2
    all_alike[:, 0] = 0  # the median
    noise += torch.randn(4, 1001, generator=torch.Generator().manual_seed(0))
    found = spread(torch.stack([one, all_alike, noise, torch.full_like(one, 7)]))
    assert found[0] == pytest.approx(1 / 4004)
    assert found[1] == pytest.approx(1000 / 1001)
    assert found[2] == pytest.approx(2 / np.pi, abs=0.03)
    assert found[3] == 0


def test_a_change_is_seen_on_the_tokens_from_its_own_on():
    model = Model("tiny", "none", tiny_model(), tiny_tokenizer())
    ids, delta = torch.arange(1, 30), torch.zeros(1, 32)
    delta[0, 3] = 5

    def push(x, _where):
        x = x.clone()
        x[:, 10] += delta
        return x

    with replace(model, HOOK, push):
        changed = model(ids[None])[:, 10:26]
    expected = spread(changed - model(ids[None])[:, 10:26])
    assert spreads(model, HOOK, ids, 10, delta) == pytest.approx(expected, rel=1e-3)


def test_a_model_that_rounds_is_refused(tmp_path):
    model = Model("tiny", "none", tiny_model().bfloat16(), tiny_tokenizer())
    cache = planted_run(tmp_path / "run", torch.randn(64, 32)).activations(HOOK)
    with pytest.raises(InputError, match="add --model-dtype float32"):
        ablation(projection(torch.zeros(32), torch.eye(32)), model, cache)


def test_ablation_of_a_tiny_model_has_a_random_direction_beside(tmp_path):
    model = Model("tiny", "none", tiny_model(), tiny_tokenizer())
    cache = planted_run(tmp_path / "run", torch.randn(640, 32)).activations(HOOK)
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=8))
    sae.initialise(torch.zeros(1, 32), seed=0)
    found = ablation(sae.requires_grad_(False), model, cache, n_contexts=5)
    assert set(found) == {"ablation.spread", "control.random.ablation.spread"}
    assert all(0 < each.value < 1 and each.n == 5 for each in found.values())
    sae.b_enc.data.fill_(-1e6)
    assert ablation(sae, model, cache, n_contexts=5) == {}


def test_on_the_embedded_model_all_shipped_words_are_read_and_its_activations_know_their_senses(model):
    contexts = [SenseContext(*row) for row in sense_contexts()]
    sequences, kept = prompts(model, contexts)
    assert kept == contexts
    x = rows_of_last(model, "blocks.15.hook_resid_post", sequences)
    sae = TopKSAE(TopKConfig(d_in=576, d_sae=256, k=16))
    sae.initialise(x.mean(dim=0, keepdim=True), seed=0)
    found = polysemy_of(x, kept, sae, sae)
    assert found["control.dense.polysemy.accuracy"].lo > 0.7
    assert found["control.dense.polysemy.accuracy"].value > found["polysemy.accuracy"].value
