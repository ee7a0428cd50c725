"""Probes are the minimum they claim to be; planted classes are found by the latents that carry them."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from activations.errors import InputError
from activations.packages import folder_hash
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.evals import labelled
from sae.evals.labelled import kept_rows, labelled_sets, last_token_rows, sets_folder
from sae.evals.logistic import auc, f1, fit_probe, folds_of, newton
from sae.evals.probing import KS, by_difference, columns, compared, metrics_of, set_scores, split
from sae.evals.subject import Other, Subject
from tests.tiny import HOOK, planted_rows, planted_run, spaced_tokenizer, tiny_model


def test_newton_finds_the_minimum_of_the_penalised_loss_for_each_weighting():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.random(60) < 0.4
    weights = np.stack([np.ones(60), np.arange(60) % 3 > 0])
    found = newton(torch.tensor(x), torch.tensor(y).double(), torch.tensor(weights), 0.7, torch.zeros(2, 4).double())
    for weight, parameters in zip(weights, found.numpy(), strict=True):

        def loss(at, weight=weight):
            scores = x @ at[:3] + at[3]
            return (weight * np.logaddexp(0, np.where(y, -scores, scores))).sum() + (at[:3] ** 2).sum() / 1.4

        assert parameters == pytest.approx(minimize(loss, np.zeros(4), tol=1e-10).x, abs=1e-3)


def test_classes_that_a_plane_parts_end_in_finite_weights():
    x = torch.tensor([[-1.0], [-2.0], [1.0], [3.0]] * 5)
    probe = fit_probe(x, (x[:, 0] > 0).numpy())
    assert torch.isfinite(probe.w).all()
    assert probe.w.item() > 0
    assert (probe.score(x) > 0).tolist() == (x[:, 0] > 0).tolist()


def test_a_column_that_never_changes_has_no_part():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    classes = (x[:, 0] > 0).numpy()
    x[:, 1] = 3
    assert fit_probe(x, classes).w[1] == 0


def test_auc_is_the_share_of_pairs_in_order_and_equals_count_half():
    classes = np.array([True, False, True, False])
    assert auc(np.array([3.0, 1.0, 2.0, 2.0]), classes) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auc(np.zeros(4), classes) == 0.5
    assert f1(np.array([True, True, False, False]), classes) == 0.5


def test_folds_and_the_test_share_have_both_classes_in_proportion():
    classes = np.arange(100) < 20
    fold = folds_of(classes, seed=3)
    assert [int(classes[fold == i].sum()) for i in range(5)] == [4] * 5
    train, test = split(classes, seed=3)
    assert (len(test), int(classes[test].sum())) == (30, 6)
    assert sorted([*train, *test]) == list(range(100))


def dictionary(directions: torch.Tensor, k: int) -> TopKSAE:
    sae = TopKSAE(TopKConfig(d_in=directions.shape[1], d_sae=len(directions), k=k))
    sae.W_dec.data, sae.W_enc.data = directions, directions.T
    return sae


def test_latents_are_ordered_by_their_difference_in_units_of_their_own_size():
    # Class means: latent 0 of 8 against 4, latent 1 of 0.3 against 0, latent 2 of 5 in both, latent 3 never fires.
    classes = np.array([True, True, False, False])
    z = torch.tensor([[8.0, 0.3, 5, 0], [8.0, 0.3, 5, 0], [4.0, 0, 5, 0], [4.0, 0, 5, 0]])
    indices = torch.arange(4).expand(4, 4)
    assert by_difference(z, indices, classes, 4).tolist() == [1, 0, 2]
    assert torch.equal(columns(z, indices, torch.tensor([2, 0])), z[:, [2, 0]])
    assert columns(z, indices, torch.tensor([], dtype=torch.long)).shape == (4, 0)


def test_one_latent_tells_planted_classes_apart_and_a_random_dictionary_does_not():
    rows, directions = planted_rows(400, 16, 40, 3, signed=False)
    classes = np.random.default_rng(0).random(400) < 0.5
    rows = rows + 3 * torch.tensor(classes)[:, None] * directions[7]
    trained = dictionary(directions, 4)
    random = dictionary(torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.manual_seed(1)), dim=1), 4)
    scores = set_scores(rows, classes, trained, random)
    assert scores.latents["1"] > 0.97
    assert scores.dense > 0.97
    assert scores.random["1"] < scores.latents["1"] - 0.05
    again = set_scores(rows, classes, trained, trained)
    assert again.random == again.latents == scores.latents


def test_a_dictionary_that_never_fires_is_at_chance():
    dead = dictionary(torch.zeros(4, 16), 2)
    classes = np.arange(60) % 2 == 0
    scores = set_scores(torch.randn(60, 16), classes, dead, dead)
    assert set(scores.latents.values()) == {0.5}
    metrics = metrics_of({"a": scores, "b": scores}, seed=0)
    assert metrics["probing.auc_16"].value == 0.5
    assert metrics["probing.auc_16"].n == 2
    assert set(metrics) == {
        *(f"probing.auc_{k}" for k in KS),
        *(f"control.random.probing.auc_{k}" for k in KS),
        "control.dense.probing.auc",
    }


@pytest.fixture
def sets(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    lines = "".join(f"text {i},{'yes' if i % 3 == 0 else 'no'}\n" for i in range(30))
    (folder / "1_two.csv").write_text("prompt,target\n" + lines)
    (folder / "2_three.csv").write_text("prompt,target\na,1\nb,2\nc,3\n")
    (folder / "3_quoted.csv").write_text('prompt,target\n"a, ""b""\nc",0\nd,1\n')
    return folder


def test_sets_have_two_classes_and_as_many_texts_of_each(sets):
    two, quoted = labelled_sets(sets, n_rows=12, seed=0)
    assert (two.name, len(two.texts), int(two.classes.sum())) == ("1_two", 12, 6)
    assert all((int(text.split()[1]) % 3 == 0) == is_one for text, is_one in zip(two.texts, two.classes, strict=True))
    assert sorted(quoted.texts) == ['a, "b"\nc', "d"]
    assert [each.name for each in labelled_sets(sets, n_rows=12, seed=0, n_sets=1)] == ["3_quoted"]
    assert next(labelled_sets(sets, n_rows=12, seed=1)).texts != two.texts


def test_folders_without_sets_and_files_without_columns_are_one_line(tmp_path, sets):
    with pytest.raises(InputError, match="has no set of two classes: expected CSV files with columns prompt"):
        list(labelled_sets(tmp_path / "nowhere", n_rows=4, seed=0))
    (sets / "0_bad.csv").write_text("text,label\na,1\n")
    with pytest.raises(InputError, match=r"0_bad\.csv cannot be read"):
        list(labelled_sets(sets, n_rows=4, seed=0))


def test_a_wheel_is_unpacked_once_and_only_if_it_is_the_one_that_was_tested(tmp_path, monkeypatch, sets):
    import zipfile

    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sets.iterdir():
            archive.write(path, f"sae_probes/data/cleaned_data/{path.name}")
        archive.writestr("sae_probes/code.py", "raise SystemExit")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"some\.whl has files of SHA-256"):
        sets_folder(wheel)
    monkeypatch.setattr(labelled, "_SHA256", folder_hash({path.name: path for path in sets.iterdir()}))
    folder = sets_folder(wheel)
    assert {path.name for path in folder.iterdir()} == {path.name for path in sets.iterdir()}
    wheel.unlink()
    assert sets_folder() == folder
    assert sets_folder(sets) == sets


@pytest.fixture
def tiny():
    from activations.model import Model

    return Model("tiny", "none", tiny_model(), spaced_tokenizer())


TEXTS = ["w1 w2 w3", "w4 w5", "w1 w2 w3 w9 w9 w9 w9", "w7 w8 w1 w2 w3"]


def test_a_texts_row_is_that_of_its_last_token_alone(tiny):
    rows = last_token_rows(tiny, HOOK, TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        alone = last_token_rows(tiny, HOOK, [text])[0]
        assert torch.allclose(row, alone, atol=1e-5)
    cut = last_token_rows(tiny, HOOK, [TEXTS[3]], max_tokens=3)
    assert torch.allclose(cut[0], rows[0], atol=1e-5)
    assert not torch.allclose(rows[0], rows[3], atol=1e-2)
    assert last_token_rows(tiny, HOOK, [""]).shape == (1, 32)


def test_rows_are_kept_for_the_same_texts_and_made_anew_for_others(tiny, tmp_path):
    path = tmp_path / "kept.safetensors"
    rows = kept_rows(path, tiny, HOOK, TEXTS)
    made = path.stat().st_mtime_ns
    assert torch.equal(kept_rows(path, tiny, HOOK, TEXTS), rows)
    assert path.stat().st_mtime_ns == made
    assert len(kept_rows(path, tiny, HOOK, TEXTS[:2])) == 2


def test_two_dictionaries_are_compared_set_by_set(tmp_path):
    run = planted_run(tmp_path / "run", torch.randn(64, 4))
    cache = run.activations(HOOK)

    def probed(name, aucs, seed=0):
        sae = dictionary(torch.eye(4), 1)
        sae.folder = tmp_path / name
        sae.folder.mkdir()
        sets = {str(i): {"latents": dict.fromkeys(map(str, KS), value)} for i, value in enumerate(aucs)}
        record = {"model": "m", "hook": HOOK, "seed": seed, "set_rows": 9, "sets": sets}
        (sae.folder / "probing.json").write_text(json.dumps(record))
        return sae

    mine, theirs = probed("mine", [0.8, 0.9, 0.7, 0.5]), probed("theirs", [0.7, 0.8, 0.6])
    against = Other(sae=theirs, cache=cache, name="run/theirs")
    found = compared(Subject(sae=mine, cache=cache, folder=mine.folder, against=against))["probing_difference.auc_5"]
    assert (found.value, found.n) == (pytest.approx(0.1), 3)
    assert (found.lo, found.hi) == (pytest.approx(0.1), pytest.approx(0.1))
    other = Other(sae=probed("other", [0.7], seed=1), cache=cache, name="run/other")
    with pytest.raises(InputError, match="probed with seed 0 and 1"):
        compared(Subject(sae=mine, cache=cache, folder=mine.folder, against=other))
    (theirs.folder / "probing.json").unlink()
    with pytest.raises(InputError, match="has not been probed"):
        compared(Subject(sae=mine, cache=cache, folder=mine.folder, against=against))
