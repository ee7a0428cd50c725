"""k-sparse probing: how well a few latents tell two classes of text apart, over many labelled sets.

For each set: the k latents whose class means differ most (each divided by its mean where it is not 0), a logistic
regression on them (`sae.evals.logistic`), the AUC on texts that neither saw. Beside: the same on the dense activations,
and on a random dictionary. What each set gave is kept in probing.json, so that two dictionaries can be compared by set.
Source: Kantamneni et al. 2025, arXiv:2502.16681; choice of latents as there. Differs: L2 penalty, all classes balanced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from activations.errors import InputError
from activations.files import read_json, write_json
from sae.base import SAE
from sae.evals.controls import random_dictionary
from sae.evals.labelled import kept_rows, labelled_sets, rows_path, sets_folder
from sae.evals.logistic import auc, fit_probe
from sae.evals.metric import Metric, bootstrap, mean_of
from sae.evals.subject import Subject

KS = (1, 2, 5, 10, 16)
TEST_SHARE = 0.3
RECORD = "probing.json"
SETTINGS = ("model", "hook", "seed", "set_rows")
"""What two records must agree in to be compared."""


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """AUC on the test texts of one labelled set."""

    latents: dict[str, float]
    """By k."""
    random: dict[str, float]
    dense: float


def probing(subject: Subject) -> dict[str, Metric]:
    """Mean AUC over the labelled sets at each k, with a bootstrap interval over sets; `probing.json` has each set's."""
    options, sae = subject.options, subject.sae
    assert subject.model is not None
    assert subject.folder is not None
    run = subject.folder.parent.parent
    control = random_dictionary(sae, subject.cache.mean, k=subject.l0, seed=options.seed)
    folder = sets_folder(options.sets_from)
    sets = labelled_sets(folder, n_rows=options.set_rows, seed=options.seed, n_sets=options.sets)
    scores: dict[str, SetScores] = {}
    for each in tqdm(sets, desc="probing", unit="set", disable=None):
        rows = kept_rows(rows_path(run, sae.hook, each.name), subject.model, sae.hook, each.texts)
        scores[each.name] = set_scores(rows, each.classes, sae, control, seed=options.seed)
    settings = {"model": subject.model.name, "hook": sae.hook, "seed": options.seed, "set_rows": options.set_rows}
    record = {name: asdict(score) for name, score in scores.items()}
    write_json(subject.folder / RECORD, {**settings, "sets": record})
    return metrics_of(scores, options.seed)


@torch.no_grad()
def set_scores(
    x: Float[Tensor, "n d_in"], classes: Bool[np.ndarray, " n"], sae: SAE, control: SAE, *, seed: int = 0
) -> SetScores:
    """The AUCs of one set; 30 % of each class, drawn with `seed`, are the test."""
    x = x.to(sae.W_dec.device, torch.float32)
    train, test = split(classes, seed)
    dense = fit_probe(x[train], classes[train], seed=seed)
    return SetScores(
        latents=sparse_aucs(x, classes, sae, train, test, seed),
        random=sparse_aucs(x, classes, control, train, test, seed),
        dense=auc(dense.score(x[test]).cpu().numpy(), classes[test]),
    )


def sparse_aucs(
    x: Float[Tensor, "n d_in"],
    classes: Bool[np.ndarray, " n"],
    sae: SAE,
    train: Int[np.ndarray, " _train"],
    test: Int[np.ndarray, " _test"],
    seed: int,
) -> dict[str, float]:
    """AUC on the test rows by k, for the k latents chosen on the training rows (fewer where fewer fire)."""
    values, indices = sae.encode_sparse(x)
    order = by_difference(values[train], indices[train], classes[train], sae.d_sae)[: max(KS)]
    z = columns(values, indices, order)
    found = {}
    for k in KS:
        if z.shape[1] == 0:
            found[str(k)] = 0.5
            continue
        probe = fit_probe(z[train, :k], classes[train], seed=seed)
        found[str(k)] = auc(probe.score(z[test, :k]).cpu().numpy(), classes[test])
    return found


def by_difference(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], classes: Bool[np.ndarray, " n"], d_sae: int
) -> Int[Tensor, " firing"]:
    """The latents that fire, those first whose class means differ most, in units of their mean size where not 0."""
    ones = torch.as_tensor(classes, device=values.device)
    sums = values.new_zeros(3, d_sae)
    sign = torch.where(ones, 1 / ones.sum(), -1 / (~ones).sum())[:, None]
    for total, each in zip(sums, (values * sign, values.abs(), (values != 0).to(values.dtype)), strict=True):
        total.index_add_(0, indices.flatten(), each.flatten())
    difference, size, n_fired = sums[0], sums[1], sums[2]
    score = torch.where(n_fired > 0, difference.abs() * n_fired / size.clamp(min=1e-30), -1.0)
    order = score.argsort(descending=True, stable=True)
    return order[: int((n_fired > 0).sum())]


def columns(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], latents: Int[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """The chosen latents of each row, dense."""
    each = [(values * (indices == latent)).sum(dim=1) for latent in latents]
    return torch.stack(each, dim=1) if each else values.new_zeros(len(values), 0)


def split(classes: Bool[np.ndarray, " n"], seed: int) -> tuple[Int[np.ndarray, " _a"], Int[np.ndarray, " _b"]]:
    """(training rows, test rows): 30 % of each class are the test."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for is_one in (False, True):
        rows = rng.permutation(np.flatnonzero(classes == is_one))
        n_test = round(len(rows) * TEST_SHARE)
        test.append(rows[:n_test])
        train.append(rows[n_test:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def metrics_of(scores: Mapping[str, SetScores], seed: int) -> dict[str, Metric]:
    of = "labelled sets of two classes"

    def mean(each: Sequence[float], what: str) -> Metric:
        return mean_of(np.array(each), of=of, definition=f"mean AUC on test texts of {what}", seed=seed)

    found: dict[str, Metric] = {}
    for k in KS:
        what = f"a logistic regression on {k} latents"
        found[f"probing.auc_{k}"] = mean([score.latents[str(k)] for score in scores.values()], what)
    for k in KS:
        what = f"a logistic regression on {k} latents of a random dictionary"
        found[f"control.random.probing.auc_{k}"] = mean([score.random[str(k)] for score in scores.values()], what)
    what = "a logistic regression on the activations"
    found["control.dense.probing.auc"] = mean([score.dense for score in scores.values()], what)
    return found


def compared(subject: Subject) -> dict[str, Metric]:
    """AUC of the dictionary minus that of `against`, set by set, on the same texts: the mean at each k.

    Raises InputError unless both have been probed in the same way.
    """
    assert subject.against is not None
    mine, theirs = _record(subject.folder), _record(subject.against.sae.folder)
    for key in SETTINGS:
        if mine[key] != theirs[key]:
            raise InputError(
                f"The two were probed with {key} {mine[key]!r} and {theirs[key]!r}: run `sae eval --metric probing` "
                "with the same settings on both."
            )
    names = sorted(mine["sets"].keys() & theirs["sets"].keys())
    found = {}
    for k in map(str, KS):
        each = [mine["sets"][name]["latents"][k] - theirs["sets"][name]["latents"][k] for name in names]
        found[f"probing_difference.auc_{k}"] = paired(np.array(each), subject.against.name, k, mine["seed"])
    return found


def paired(differences: Float[np.ndarray, " sets"], other: str, k: str, seed: int) -> Metric:
    """The mean difference over sets, with a bootstrap interval over sets."""
    lo, hi = bootstrap(len(differences), lambda drawn: float(differences[drawn].mean()), seed)
    return Metric(
        value=float(differences.mean()),
        n=len(differences),
        of="labelled sets that both were probed on",
        definition=f"AUC at {k} latents minus that of {other}, mean over sets",
        lo=lo,
        hi=hi,
        seed=seed,
    )


def _record(folder: Path | None) -> Any:
    if folder is None or not (folder / RECORD).exists():
        raise InputError(f"{folder} has not been probed: run `sae eval {folder} --metric probing` first.")
    return read_json(folder / RECORD)
