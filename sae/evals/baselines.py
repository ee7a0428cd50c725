"""Reconstruction and loss of the dictionaries that learnt nothing (`sae.evals.controls`), on the same rows."""

from sae.evals.controls import controls
from sae.evals.metric import Metric
from sae.evals.reconstruction import reconstruction
from sae.evals.splice_loss import Change, delta_ce, splice_losses
from sae.evals.subject import Subject

SHOWN = ("fvu", "cosine", "l0", "norm_ratio")


def baselines(subject: Subject) -> dict[str, Metric]:
    """`control.NAME.fvu`, cosine, l0 and norm_ratio, and with a model delta_ce, for random, pca, identity and mean."""
    options = subject.options
    made = controls(subject.sae, subject.cache, k=subject.l0, seed=options.seed)
    found: dict[str, Metric] = {}
    for name, each in made.items():
        measured = reconstruction(each, subject.cache)
        found |= {f"control.{name}.{key}": measured[key] for key in SHOWN}
    if subject.model is not None:
        changes: dict[str, Change] = {name: each.reconstruct for name, each in made.items()}
        at = [subject.cache]
        (losses,) = splice_losses(
            changes, subject.model, at, at, n_contexts=options.contexts, seed=options.seed
        ).values()
        found |= {f"control.{name}.delta_ce": delta_ce(losses, name, options.seed) for name in made}
    return found
