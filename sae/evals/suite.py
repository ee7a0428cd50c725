"""All metrics of one dictionary into eval.json."""

from dataclasses import asdict
from pathlib import Path

from activations.cache import SINK_FACTOR, Activations, CachedActivations
from activations.errors import InputError
from activations.files import write_json
from activations.model import Model
from activations.run import Run, versions
from sae.base import SAE
from sae.evals.metric import Metric, over_hooks
from sae.evals.reconstruction import dead_share, reconstruction
from sae.evals.splice_loss import splice_loss
from sae.files import load_sae
from sae.frozen import stitched
from sae.rows import rows_for
from sae.train import begun_with

EVAL = "eval.json"


def evaluate(folder: Path, model: Model | None, *, n_contexts: int = 64, seed: int = 0) -> dict[str, Metric]:
    """Measure the dictionary in `folder`, part of a run, on the run's cache and model; writes eval.json.

    model: None for a run of vectors, which has none: what needs one is left out.

    Raises InputError when the run's activations are gone.
    """
    device = str(model.device if model is not None else "cpu")
    sae = load_sae(folder, device=device)
    metrics = over_hooks(
        {
            hook: measure(whole, model, rows, n_contexts=n_contexts, seed=seed, trained=sae)
            for hook, whole, rows in measured_on(folder, sae)
        }
    )
    record = {
        "seed": seed,
        "versions": versions(),
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
    }
    write_json(folder / EVAL, record)
    return metrics


def measured_on(folder: Path, sae: SAE) -> list[tuple[str, SAE, Activations]]:
    """(hook, dictionary, rows) of each measurement of `sae`, trained in `folder` of a run. Raises InputError.

    One that was trained on pooled hooks is measured at each. A boost is measured with the base that it belongs to.
    """
    run, settings = Run.open(folder.parent.parent), begun_with(folder)
    if settings is None:
        raise InputError(f"{folder} has no train.json that says what it reads: train it with `sae train`.")
    if settings.hooks and not sae.joint:
        return [(hook, sae.at(hook), run.activations(hook)) for hook in settings.hooks]
    if settings.base is not None:
        sae = stitched(load_sae(run.dictionary(settings.base), device=str(sae.W_dec.device)), sae)
    return [(settings.hook, sae, rows_for(settings, run.activations))]


def measure(
    sae: SAE,
    model: Model | None,
    rows: Activations,
    *,
    n_contexts: int = 64,
    seed: int = 0,
    trained: SAE | None = None,
) -> dict[str, Metric]:
    """All metrics, nothing written. trained: whose latents may be dead, where `sae` has others too."""
    cache = rows.parts[0]
    assert isinstance(cache, CachedActivations), f"{cache.hook} is not cached"
    sinks = Metric(
        value=cache.sink_share,
        n=cache.n_rows,
        of="cached tokens",
        definition=f"share of tokens past position 0 with a norm over {SINK_FACTOR:g} medians; left out elsewhere",
    )
    return {
        **reconstruction(sae, rows),
        "dead": dead_share(trained or sae),
        "sinks": sinks,
        **(splice_loss(sae, model, rows, n_contexts=n_contexts, seed=seed) if model is not None else {}),
    }
