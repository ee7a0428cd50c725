"""All metrics of one dictionary into eval.json."""

from dataclasses import asdict
from pathlib import Path

from activations.cache import SINK_FACTOR, CachedActivations
from activations.files import read_json, write_json
from activations.model import Model
from activations.run import Run, versions
from sae.base import SAE
from sae.evals.metric import Metric
from sae.evals.reconstruction import dead_share, reconstruction
from sae.evals.splice_loss import splice_loss
from sae.files import load_sae

EVAL = "eval.json"


def evaluate(folder: Path, model: Model | None, *, n_contexts: int = 64, seed: int = 0) -> dict[str, Metric]:
    """Measure the dictionary in `folder`, part of a run, on the run's cache and model; writes eval.json.

    model: None for a run of vectors, which has none: what needs one is left out.

    Raises InputError when the run's activations are gone.
    """
    cache = Run.open(folder.parent.parent).activations(str(read_json(folder / "train.json")["hook"]))
    sae = load_sae(folder, device=str(model.device if model is not None else "cpu"))
    metrics = measure(sae, model, cache, n_contexts=n_contexts, seed=seed)
    record = {
        "seed": seed,
        "versions": versions(),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
    }
    write_json(folder / EVAL, record)
    return metrics


def measure(
    sae: SAE, model: Model | None, cache: CachedActivations, *, n_contexts: int = 64, seed: int = 0
) -> dict[str, Metric]:
    """All metrics, nothing written."""
    sinks = Metric(
        value=cache.sink_share,
        n=cache.n_rows,
        of="cached tokens",
        definition=f"share of tokens past position 0 with a norm over {SINK_FACTOR:g} medians; left out elsewhere",
    )
    return {
        **reconstruction(sae, cache),
        "dead": dead_share(sae),
        "sinks": sinks,
        **(splice_loss(sae, model, cache, n_contexts=n_contexts, seed=seed) if model is not None else {}),
    }
