"""A feature store in Neuronpedia's batch form, as its own exporter and SAEDashboard write it.

    OUT/MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl
    OUT/MODEL/LAYER-SET/{features,activations,explanations}/batch-N.jsonl.gz      1,024 features each

The keys are columns of its tables Neuron, Activation and Explanation. What those cannot say: the pole of an example
(values keep their sign), a score, and an explainer or model that its own tables do not name; source, explainer, model
and pole of an explanation stand in its `notes`, as JSON, where `autointerp.neuronpedia_import` looks for them.
Source: SAEDashboard, neuronpedia/neuronpedia_export.py and neuronpedia_converter.py; Neuronpedia, export-data.py,
lib/db/import.ts and prisma/schema.prisma.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from activations.errors import InputError
from activations.files import write_aside
from data.store import Example, Explanation, Feature, Store, TokenValue, open_store
from data.store.schema import now

BATCH = 1024
CREATOR = "clkht01d40000jv08hvalcvly"
"""Whom its importer takes for the author of bulk data: the column must name a user of the site."""
NOTED = ("source", "explainer", "model", "pole")
"""What of an explanation of ours goes into `notes`."""
TOP = -1.0
"""`binMin` and `binContains` of the windows with the largest values, as SAEDashboard has it."""


def export(address: str | Path, out: Path) -> Path:
    """Write the store of a dictionary (RUN, RUN/ID or its folder) below the folder `out`; the source's folder.

    Windows of the kinds top and interval are written, each with all its tokens and values.
    Raises StoreError when there is no store, InputError for a folder that is there already.
    """
    with open_store(address) as store:
        model, set_name, source = _names(store)
        folder = out / model / source
        if folder.exists():
            raise InputError(f"{folder} is there already: export into another folder, or remove it.")
        about = {"modelId": model, "layer": source}
        with write_aside(folder) as aside:
            aside.mkdir(parents=True)
            _write_heads(aside, store, model, set_name, source)
            for part in ("features", "activations", "explanations"):
                (aside / part).mkdir()
            firsts = range(0, store.n_features, BATCH)
            for i, first in enumerate(tqdm(firsts, desc="features", unit="batch", disable=None)):
                numbers = range(first, min(first + BATCH, store.n_features))
                features = [store.feature(number) for number in numbers]
                examples = store.examples_of(numbers)
                lines = {
                    "features": [_feature(store, each, about, set_name) for each in features],
                    "activations": [
                        _activation(store, each, examples_of, about)
                        for each in features
                        for examples_of in examples.get(each.feature, ())
                        if examples_of.kind in ("top", "interval")
                    ],
                    "explanations": [_explanation(text, about) for each in features for text in each.explanations],
                }
                for part, rows in lines.items():
                    if rows:  # its importer reads the columns off the first line
                        _write(aside / part / f"batch-{i}.jsonl.gz", rows)
    return folder


def _names(store: Store) -> tuple[str, str, str]:
    """(model, set, source) as ids may be: the source is LAYER-SET."""
    hook = store.meta.get("hook", "")
    layer = re.match(r"blocks\.(\d+)\.", hook)
    name = re.sub(r"[^a-z0-9_-]+", "-", store.name.lower()).strip("-") or "set"
    model = re.sub(r"[^a-z0-9_.-]+", "-", store.meta.get("model", "").lower().rstrip("/").split("/")[-1]).strip("-.")
    return model or "model", name, f"{layer[1] if layer else 0}-{name}"


def _write_heads(folder: Path, store: Store, model: str, set_name: str, source: str) -> None:
    """One line each about the release, the model, the set and the source: what its importer needs first."""
    told = store.meta.get("corpus", "")
    made: dict[str, Any] = {"creatorId": CREATOR, "createdAt": now()}
    heads: dict[str, dict[str, Any]] = {
        "release": {"name": set_name, "description": set_name, "urls": [], "creatorName": "", **made},
        "model": {
            "id": model,
            "displayName": model,
            "displayNameShort": model,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            **made,
        },
        "sourceset": {
            "modelId": model,
            "name": set_name,
            "description": set_name,
            "creatorName": "",
            "urls": [],
            "releaseName": set_name,
            **made,
        },
        "source": {
            "id": source,
            "modelId": model,
            "setName": set_name,
            "dataset": told,
            "notes": f"{store.meta.get('n_tokens', '?')} tokens",
            **made,
        },
    }
    for name, row in heads.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def _feature(store: Store, feature: Feature, about: Mapping[str, str], set_name: str) -> dict[str, Any]:
    top, bottom = feature.top_logits, feature.bottom_logits
    return {
        **about,
        "index": str(feature.feature),
        "sourceSetName": set_name,
        "creatorId": CREATOR,
        "maxActApprox": feature.max,
        "hasVector": False,
        "vector": [],
        "hookName": store.meta.get("hook", ""),
        "topkCosSimIndices": [each.feature for each in feature.neighbours],
        "topkCosSimValues": [each.cosine for each in feature.neighbours],
        **dict.fromkeys(
            (
                "neuron_alignment_indices",
                "neuron_alignment_values",
                "neuron_alignment_l1",
                "correlated_neurons_indices",
                "correlated_neurons_pearson",
                "correlated_neurons_l1",
                "decoder_weights_dist",
            ),
            (),
        ),
        "pos_str": _tokens(store, top),
        "pos_values": [each.value for each in top],
        "neg_str": _tokens(store, bottom),
        "neg_values": [each.value for each in bottom],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_heights": feature.hist_counts,
        "freq_hist_data_bar_values": _middles(feature.hist_edges),
        "logits_hist_data_bar_heights": feature.logit_counts,
        "logits_hist_data_bar_values": _middles(feature.logit_edges),
    }


def _activation(store: Store, feature: Feature, example: Example, about: Mapping[str, str]) -> dict[str, Any]:
    largest = max(example.acts)
    key = f"{about['modelId']}/{about['layer']}/{feature.feature}/{example.pole}/{example.kind}/{example.rank}"
    return {
        "id": _id(key),
        **about,
        "index": str(feature.feature),
        "creatorId": CREATOR,
        "tokens": store.token_texts(example.token_ids),
        "values": example.acts,
        "maxValue": largest,
        "maxValueTokenIndex": example.acts.index(largest),
        "minValue": min(example.acts),
        "dataSource": store.meta.get("corpus", ""),
        "dataIndex": str(example.start),
        "dfaValues": [],
        "dfaMaxValue": None,
        "dfaTargetIndex": None,
        "qualifyingTokenIndex": example.peak_index,
        **_bin(store, feature, example),
    }


def _bin(store: Store, feature: Feature, example: Example) -> dict[str, float | None]:
    """The interval of values that the window's peak lies in; of a top window, that it is one.

    `binContains`, the share of firings in the interval, is counted from the histogram's bars whose middle lies there.
    """
    whole = feature.max if example.pole == "+" else feature.min
    if example.kind == "top":
        return {"binMin": TOP, "binMax": whole, "binContains": TOP}
    bands = int(store.meta.get("bands", "4"))
    low, high = sorted((whole * example.band / bands, whole * (example.band + 1) / bands))
    bars = zip(_middles(feature.hist_edges), feature.hist_counts, strict=True)
    inside = sum(count for middle, count in bars if low < middle <= high)
    return {"binMin": low, "binMax": high, "binContains": inside / max(sum(feature.hist_counts), 1)}


def _explanation(explanation: Explanation, about: Mapping[str, str]) -> dict[str, Any]:
    """typeName and explanationModelName refer to rows of the site's own tables, where ours are not."""
    told = {key: getattr(explanation, key) for key in NOTED}
    return {
        "id": _id(f"{about['modelId']}/{about['layer']}/{explanation.id}"),
        **about,
        "index": str(explanation.feature),
        "authorId": CREATOR,
        "description": explanation.text,
        "embedding": None,
        "typeName": None,
        "explanationModelName": None,
        "notes": json.dumps(told, ensure_ascii=False),
    }


def _tokens(store: Store, values: Sequence[TokenValue]) -> list[str]:
    return [store.token_texts([each.id])[0] for each in values]


def _middles(edges: Sequence[float]) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(edges)]


def _id(key: str) -> str:
    """25 letters and digits that are the same every time, as its ids are."""
    return "c" + hashlib.sha256(key.encode()).hexdigest()[:24]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
