"""What the names of eval.json mean to a reader of a plot: a title, which end is better, the row that measures it.

A name that is not here is shown as it is, and neither end of it is called better.
"""

import re
from typing import NamedTuple

HIGHER, LOWER, NEITHER = 1, -1, 0


class Kind(NamedTuple):
    """How a metric is shown."""

    title: str
    better: int
    row: str | None
    """Of the suite: what `sae eval --metric` takes."""

    @property
    def direction(self) -> str:
        return {HIGHER: "higher is better", LOWER: "lower is better"}.get(self.better, "neither end is better")


_KNOWN = {
    "fvu": Kind("FVU", LOWER, "reconstruction"),
    "ce_score": Kind("CE score", HIGHER, "splice"),
    "delta_ce": Kind("\u0394 CE, nats", LOWER, "splice"),
    "kl": Kind("KL, nats", LOWER, "splice"),
    "probing.auc_1": Kind("probing AUC, 1 latent", HIGHER, "probing"),
    "probing.auc_2": Kind("probing AUC, 2 latents", HIGHER, "probing"),
    "probing.auc_5": Kind("probing AUC, 5 latents", HIGHER, "probing"),
    "probing.auc_10": Kind("probing AUC, 10 latents", HIGHER, "probing"),
    "probing.auc_16": Kind("probing AUC, 16 latents", HIGHER, "probing"),
    "truth.mcc": Kind("MCC", HIGHER, "truth"),
    "truth.f1": Kind("F1 of planted features", HIGHER, "truth"),
    "dead": Kind("dead, share of the latents", LOWER, "density"),
    "l0": Kind("L0", NEITHER, "reconstruction"),
    "explained_variance": Kind("explained variance", HIGHER, "reconstruction"),
    "cosine": Kind("cosine of x and x_hat", HIGHER, "reconstruction"),
    "ce_spliced": Kind("CE with the reconstruction, nats", LOWER, "splice"),
    "ce_score_zero": Kind("CE score against zero ablation", HIGHER, "splice"),
    "kl_score": Kind("KL score", HIGHER, "splice"),
    "truth.precision": Kind("precision on planted features", HIGHER, "truth"),
    "truth.recall": Kind("recall of planted features", HIGHER, "truth"),
    "truth.uniqueness": Kind("different features, over latents", HIGHER, "truth"),
    "truth.ev": Kind("explained variance on new rows", HIGHER, "truth"),
    "truth.dead": Kind("dead on new rows, share of the latents", LOWER, "truth"),
    "truth.absorption": Kind("absorption of planted features", LOWER, "truth"),
    "truth.split": Kind("split features, share", LOWER, "truth"),
    "truth.recall_alone": Kind("recall of parents alone", HIGHER, "truth"),
    "truth.recall_with_child": Kind("recall of parents with a child", HIGHER, "truth"),
    "geometry.duplicates": Kind("duplicate decoder rows, share", LOWER, "geometry"),
    "cost.encode_speed": Kind("tokens encoded a second", HIGHER, "cost"),
    "cost.bytes": Kind("bytes of the parameters", LOWER, "cost"),
}
FIRST = tuple(_KNOWN)
"""In the order of a picker; all others come after."""


def kind_of(name: str, row: str | None = None) -> Kind:
    """How the metric `name` is shown; "fvu HOOK" is FVU at one of several hooks. row: what eval.json says measured it,
    which is believed where it looks like a row's name and the name is not known here.
    """
    base, _, hook = name.partition(" ")
    if base in _KNOWN:
        known = _KNOWN[base]
        return known._replace(title=f"{known.title}, {hook}") if hook else known
    return Kind(name, NEITHER, row if row is not None and re.fullmatch(r"[a-z_]{1,40}", row) else None)
