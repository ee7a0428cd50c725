"""Labels a dictionary's features: explains them, scores the explanations on unseen text, and stores both.

A job may be killed at any moment and started again: what has an explanation of this explainer and model, and its score,
is skipped; results go to the store every 30 s; and every answer of a language model is in the request cache before it
is used, so that nothing is paid twice.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from activations.errors import InputError
from activations.files import lock
from autointerp.client import ChatClient
from autointerp.job import LabelReport
from autointerp.lexical_job import label_by_rules
from autointerp.llm_job import label_by_model
from autointerp.scorers.detection import DetectionOptions
from data.store import Store, open_store

_DENSITIES = (1e-4, 0.1)


def label(
    address: str | Path,
    *,
    features: Sequence[int] | None = None,
    explainer: Literal["llm", "lexical"] = "llm",
    client: ChatClient | None = None,
    scorer: bool = True,
    redo: bool = False,
    budget_tokens: int | None = None,
    options: DetectionOptions | None = None,
) -> LabelReport:
    """Explain and score features of a dictionary (RUN, RUN/ID or its folder), and store the results.

    features: numbers, by default all; those that never fired are passed over. explainer: a language model, asked
    through `client`, or a search over simple rules. redo: explain again what is explained already, without the stored
    answers. budget_tokens: stop before the model's tokens, in and out, exceed this. options: the windows that a model
    judges.
    Raises InputError for a missing client, a server that does not serve, features that do not exist, and while another
    job labels the same dictionary; StoreError when there is no feature store. What was finished before an error is
    stored.
    """
    with open_store(address) as store, lock(store.folder / ".label.lock"):
        alive = store.features()
        if wrong := [feature for feature in features or [] if not 0 <= feature < store.n_features]:
            raise InputError(f"There is no feature {wrong[0]}: expected 0 to {store.n_features - 1}.")
        wanted = alive if features is None else sorted(set(features) & set(alive), key=list(features).index)
        if explainer == "lexical":
            return label_by_rules(store, wanted, scorer=scorer, redo=redo)
        if client is None:
            raise InputError("A language model's explanation needs one: pass client=ChatClient(model, base_url).")
        chosen = options or DetectionOptions()
        return _finish(
            lambda: label_by_model(
                store, wanted, client, options=chosen, scorer=scorer, redo=redo, budget_tokens=budget_tokens
            )
        )


def pick_features(store: Store, n: int, seed: int = 0) -> list[int]:
    """`n` living features that are neither rare nor dense (they fire on 1e-4 to 0.1 of the tokens), in a random order.

    A smaller `n` gives the beginning of the same list, so that a job can be extended; all of them if there are fewer.
    """
    low, high = _DENSITIES
    page = store.page(sort="feature", descending=False, min_density=low, max_density=high, limit=store.n_features)
    moderate = [row.feature for row in page.rows]
    random.Random(seed).shuffle(moderate)
    return moderate[:n]


def _finish(job: Callable[[], Coroutine[Any, Any, LabelReport]]) -> LabelReport:
    """Run a coroutine to its end, also where an event loop runs already (a notebook): then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(job())).result()
