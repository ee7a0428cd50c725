"""Reconstruction and loss of the dictionaries that learnt nothing (`sae.evals.controls`), on the same rows."""

from collections.abc import Mapping

from sae.base import SAE
from sae.evals.controls import controls
from sae.evals.metric import Metric
from sae.evals.reconstruction import reconstruction
from sae.evals.splice_loss import Change, delta_ce, splice_losses
from sae.evals.subject import Subject

SHOWN = ("fvu", "cosine", "l0", "norm_ratio")


def baselines(subject: Subject) -> dict[str, Metric]:
    """`control.NAME.fvu`, cosine, l0 and norm_ratio, and with a model delta_ce, for random, pca, identity and mean.

    Of one run they depend on the hook and the dictionary's sizes alone: for equal ones they are measured once
    (`Options.kept`).
    """
    sae, k, kept = subject.sae, subject.l0, subject.options.kept
    depends = {"random": (k, sae.d_sae, sae.signed), "pca": (k,), "identity": (), "mean": ()}
    keys = {name: ("control", name, subject.cache.hook, on) for name, on in depends.items()}
    kept = {} if kept is None else kept
    if missing := [name for name, key in keys.items() if key not in kept]:
        made = controls(sae, subject.cache, k=k, seed=subject.options.seed)
        measured = _measured(subject, {name: made[name] for name in missing})
        kept |= {keys[name]: measured[name] for name in missing}
    return {f"control.{name}.{metric}": each for name, key in keys.items() for metric, each in kept[key].items()}


def _measured(subject: Subject, made: Mapping[str, SAE]) -> dict[str, dict[str, Metric]]:
    options = subject.options
    found: dict[str, dict[str, Metric]] = {}
    for name, each in made.items():
        measured = reconstruction(each, subject.cache)
        found[name] = {key: measured[key] for key in SHOWN}
    if subject.model is not None:
        changes: dict[str, Change] = {name: each.reconstruct for name, each in made.items()}
        at = [subject.cache]
        (losses,) = splice_losses(
            changes, subject.model, at, at, n_contexts=options.contexts, seed=options.seed
        ).values()
        for name in made:
            found[name]["delta_ce"] = delta_ce(losses, name, options.seed)
    return found
