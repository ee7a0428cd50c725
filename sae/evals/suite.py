"""All metrics of one dictionary into eval.json. The table below says what there is, what each needs, and when it runs.

Running one metric keeps the others' numbers. A dictionary from elsewhere (`sae.interop.run`) gets its statistics first.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from activations.cache import SINK_FACTOR, Activations, CachedActivations
from activations.errors import InputError
from activations.files import read_json, write_json
from activations.joined import Joined
from activations.model import Model
from activations.run import Run, dictionary_folder, versions
from sae.base import SAE
from sae.evals.ablation import ablation
from sae.evals.absorption import absorption
from sae.evals.baselines import baselines
from sae.evals.cost import cost
from sae.evals.dark_matter import dark_matter
from sae.evals.density import density
from sae.evals.explainability import explainability
from sae.evals.geometry import geometry
from sae.evals.metric import Metric, over_hooks
from sae.evals.polysemy import polysemy
from sae.evals.probing import compared, probing
from sae.evals.reconstruction import reconstruction
from sae.evals.splice_loss import splice_loss
from sae.evals.stability import stability
from sae.evals.subject import Options, Other, Subject
from sae.evals.truth import against_the_truth
from sae.evals.universality import universality
from sae.files import load_sae, save_statistics
from sae.frozen import stitched
from sae.rows import parts_read, rows_for
from sae.statistics import latent_statistics
from sae.train import begun_with

EVAL = "eval.json"


class Entry(NamedTuple):
    """A row of the table."""

    measure: Callable[[Subject], dict[str, Metric]]
    needs: tuple[str, ...]
    """Beyond the weights: "cache", "model" ("model?": measures more with one), "against" (another dictionary), "sets"
    (labelled texts), "senses", "world" (that the rows are of); "one hook": dictionaries that read and give back one.
    What needs no cache is of the weights alone, and taken once where a dictionary is measured at several hooks."""
    cheap: bool
    """Runs when no metric is named, where what it needs is there."""


def sinks(cache: CachedActivations) -> dict[str, Metric]:
    """The share of tokens that no other metric looks at."""
    share = Metric(
        value=cache.sink_share,
        n=cache.n_rows,
        of="cached tokens",
        definition=f"share of tokens past position 0 with a norm over {SINK_FACTOR:g} medians; left out elsewhere",
    )
    return {"sinks": share}


def _ablation(subject: Subject) -> dict[str, Metric]:
    assert subject.model is not None
    options = subject.options
    return ablation(subject.sae, subject.model, subject.cache, n_contexts=options.contexts, seed=options.seed)


def _stability(subject: Subject) -> dict[str, Metric]:
    assert subject.against is not None
    other = subject.against
    return stability(subject.sae, other.sae, other.name, seed=subject.options.seed)


def _universality(subject: Subject) -> dict[str, Metric]:
    assert subject.against is not None
    other, seed = subject.against, subject.options.seed
    return universality(subject.sae, subject.cache, other.sae, other.cache, other.name, seed=seed)


def _splice(subject: Subject) -> dict[str, Metric]:
    assert subject.model is not None
    options = subject.options
    return splice_loss(subject.sae, subject.model, _rows(subject), n_contexts=options.contexts, seed=options.seed)


def _rows(subject: Subject) -> Activations:
    return subject.cache if subject.rows is None else subject.rows


TABLE: dict[str, Entry] = {
    "reconstruction": Entry(lambda s: reconstruction(s.sae, _rows(s)), ("cache",), cheap=True),
    "density": Entry(lambda s: density(s.sae), (), cheap=True),
    "sinks": Entry(lambda s: sinks(s.cache), ("cache",), cheap=True),
    "geometry": Entry(lambda s: geometry(s.sae), (), cheap=True),
    "cost": Entry(lambda s: cost(s.sae, seed=s.options.seed), (), cheap=True),
    "splice": Entry(_splice, ("cache", "model"), cheap=True),
    "controls": Entry(baselines, ("cache", "model?", "one hook"), cheap=False),
    "probing": Entry(probing, ("cache", "model", "sets", "one hook"), cheap=False),
    "probing_difference": Entry(compared, ("against",), cheap=False),
    "dark_matter": Entry(lambda s: dark_matter(s.sae, s.cache), ("cache", "one hook"), cheap=False),
    "explainability": Entry(explainability, ("cache", "model?", "one hook"), cheap=False),
    "ablation": Entry(_ablation, ("cache", "model", "one hook"), cheap=False),
    "absorption": Entry(absorption, ("cache", "model", "one hook"), cheap=False),
    "polysemy": Entry(polysemy, ("cache", "model", "senses", "one hook"), cheap=False),
    "truth": Entry(against_the_truth, ("world", "one hook"), cheap=False),
    "stability": Entry(_stability, ("against",), cheap=False),
    "universality": Entry(_universality, ("cache", "against", "one hook"), cheap=False),
}
"""name -> how it is measured. The order is that of the output."""


def evaluate(
    folder: Path,
    model: Model | None,
    *,
    names: Sequence[str] = (),
    skip: Collection[str] = (),
    against: str | Path | None = None,
    options: Options = Options(),  # noqa: B008  (immutable)
    device: str = "cpu",
) -> dict[str, Metric]:
    """Measure the dictionary in `folder`, part of a run, on the run's cache and model; merges into its eval.json.

    model: None for a run of vectors, which has none, and where `reads_model` says that it is not read.
    names: rows of `TABLE`; empty: those that are cheap. skip: rows that are passed over all the same.
    against: RUN/ID of the dictionary to compare with.
    device: where to compute without a model; else where that is.

    Raises InputError when the run's activations are gone, and for a metric that is unknown or lacks what it needs.
    """
    check_names(names)
    device = str(model.device) if model is not None else device
    sae = load_sae(folder, device=device)
    measured = measured_on(folder, sae)
    if sae.statistics is None:
        sae.statistics = latent_statistics([sae], measured[0][2])[0]
        save_statistics(sae.statistics, folder)
    subject = Subject(
        sae=sae,
        cache=parts_read(*measured[0][1:])[0],
        model=model,
        against=None if against is None else _other(against, device),
        folder=folder,
        options=options,
    )
    at_hooks = {
        hook: replace(subject, sae=whole, cache=parts_read(whole, rows)[0], rows=rows) for hook, whole, rows in measured
    }
    chosen = list(names) or [name for name in cheap() if not lacking(subject, name)]
    chosen = [name for name in chosen if name not in skip]
    for name in chosen:
        if what := lacking(subject, name):
            raise InputError(f"The metric {name} needs {what}.")
    found: dict[str, Metric] = {}
    for name in chosen:
        options.say(name)
        measure, needs, _ = TABLE[name]
        if "cache" in needs:
            metrics = over_hooks({hook: measure(at_hook) for hook, at_hook in at_hooks.items()})
        else:
            metrics = measure(subject)
        _keep(folder / EVAL, name, metrics)
        found |= metrics
    return found


def measured_on(folder: Path, sae: SAE) -> list[tuple[str, SAE, Activations]]:
    """(hook, dictionary, rows) of each measurement of `sae`, trained in `folder` of a run. Raises InputError.

    One that was trained on pooled hooks is measured at each. A boost is measured with the base that it belongs to.
    """
    run, settings = Run.open(folder.parent.parent), begun_with(folder)
    if settings is None:
        if sae.joint or sae.target == "error" or len(sae.hooks) > 1:
            raise InputError(
                f"{folder} has no train.json that says what else it reads: it is measured in the run that trained it."
            )
        outputs = sae.metadata.get("hook_names_out") or []
        parts = [run.activations(hook) for hook in (sae.hook, *outputs)]
        return [(sae.hook, sae, parts[0] if len(parts) == 1 else Joined(parts))]
    if settings.hooks and not sae.joint:
        return [(hook, sae.at(hook), run.activations(hook)) for hook in settings.hooks]
    if settings.base is not None:
        sae = stitched(load_sae(run.dictionary(settings.base), device=str(sae.W_dec.device)), sae)
    return [(settings.hook, sae, rows_for(settings, run.activations))]


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for a metric that is not in the table."""
    for name in names:
        if name not in TABLE:
            raise InputError(f"No metric {name!r}: expected one of {', '.join(TABLE)}.")


def cheap() -> list[str]:
    """The rows that run when none is named."""
    return [name for name, row in TABLE.items() if row.cheap]


def reads_model(names: Sequence[str]) -> bool:
    """Whether any of these (none: of the cheap ones) makes use of the language model."""
    return any(need.startswith("model") for name in names or cheap() for need in TABLE[name].needs)


def rows_measured(folder: Path) -> set[str]:
    """The rows of which the dictionary's eval.json has numbers. Raises InputError when it is damaged."""
    record: Any = read_json(folder / EVAL) if (folder / EVAL).exists() else {}
    metrics = record.get("metrics") if isinstance(record, dict) else None
    found = metrics.values() if isinstance(metrics, dict) else ()
    return {name for each in found if isinstance(each, dict) and (name := each.get("row")) in TABLE}


def lacking(subject: Subject, name: str) -> str | None:
    """What the metric needs and the subject has not, for a message; None when it can be measured.

    Raises InputError where it takes dictionaries of one hook, and a dictionary is none.
    """
    needs = TABLE[name].needs
    if "model" in needs and subject.model is None:
        return "the language model, and this run is of vectors: choose another metric"
    if "against" in needs and subject.against is None:
        return "a dictionary to compare with: add --against RUN/ID"
    if "senses" in needs and not subject.options.senses:
        return "words in their senses: give it contexts"
    if "world" in needs and subject.options.world is None:
        return "the planted world that the rows are of: add --world FOLDER"
    if "one hook" in needs:
        for sae in (subject.sae, *([] if subject.against is None else [subject.against.sae])):
            sae.only_hook(f"The metric {name}")
    return None


def _other(address: str | Path, device: str) -> Other:
    folder = dictionary_folder(address)
    sae = load_sae(folder, device=device)
    if sae.statistics is None:
        raise InputError(f"{address} has no statistics yet: run `sae eval {address}` first.")
    settings = begun_with(folder)
    cache = Run.open(folder.parent.parent).activations(sae.hook if settings is None else settings.hook)
    return Other(sae=sae, cache=cache, name=str(address))


def _keep(path: Path, name: str, metrics: dict[str, Metric]) -> None:
    """Put a row's metrics into eval.json, in place of what the row gave before."""
    record: Any = read_json(path) if path.exists() else {}
    kept = record.get("metrics") if isinstance(record, dict) else None
    others = {key: each for key, each in (kept or {}).items() if key not in metrics and each.get("row") != name}
    mine = {key: {"row": name, **asdict(metric)} for key, metric in metrics.items()}
    write_json(path, {"versions": versions(), "metrics": {**others, **mine}})
