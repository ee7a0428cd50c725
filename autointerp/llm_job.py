"""The job with a language model: explain a block of features, then judge each explanation beside that of another.

Features are worked on in blocks because a score's control is the explanation of another feature. Blocks and controls
follow from the list of features alone, so that a resumed job ends with the same scores as one that was never killed.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from autointerp.cache import RequestCache
from autointerp.client import AskError, BudgetError, ChatClient, settle
from autointerp.explainers import llm as explainer
from autointerp.explainers.llm import ParseError
from autointerp.job import MIN_WINDOWS, Job, LabelReport, Target, blocks, pick_control
from autointerp.prompt import load_prompt
from autointerp.scorers import detection
from autointerp.scorers.detection import DetectionOptions
from autointerp.windows import HeldOut, active_windows, poles, spread
from data.store import DETECTION, Example, Store

_BLOCK = 32


async def label_by_model(
    store: Store,
    features: Sequence[int],
    client: ChatClient,
    *,
    options: DetectionOptions,
    scorer: bool,
    redo: bool,
    budget_tokens: int | None,
) -> LabelReport:
    """Explain `features` by asking the client's model and, with `scorer`, have it judge the explanations."""
    job = Job(store, source="llm", explainer=explainer.EXPLAINER, model=client.model, redo=redo)
    spent = client.tokens_in, client.tokens_out
    client.budget_tokens = None if budget_tokens is None else budget_tokens + sum(spent)
    client.cache, client.reuse_answers = RequestCache(store.folder / "llm_cache"), not redo
    n_targets, stopped = 0, ""
    try:
        async with client:
            await client.check()
            with tqdm(total=len(features), desc=f"asking {client.model}", unit="feature", disable=None) as bar:
                for start, block in enumerate(blocks(features, _BLOCK)):
                    examples = store.examples_of(block)
                    targets = [(feature, pole) for feature in block for pole in poles(examples.get(feature, []))]
                    n_targets += len(targets)
                    step = len(block) / len(targets) / (1 + scorer)
                    unknown = [t for t in targets if t not in job.known]
                    await settle([_then(bar, step, _explain(job, client, t, examples)) for t in unknown])
                    if scorer:
                        texts = {t: job.known[t].text for t in targets if t in job.known}
                        unscored = [t for t in targets if job.lacks_score(t)]
                        # As many features at once as requests: one is finished before the next is begun, so that a
                        # budget or a kill leaves few of them half judged.
                        gate = asyncio.Semaphore(client.concurrency)
                        work = [_score(job, client, t, examples, texts, options, gate) for t in unscored]
                        await settle([_then(bar, step, each) for each in work])
                    bar.update(start * _BLOCK + len(block) - bar.n)
    except BudgetError as error:
        stopped = f"the budget is used up: {error}"
    finally:
        client.cache.close()
        client.cache = client.budget_tokens = None
        job.flush()
    return job.report(n_targets, client.tokens_in - spent[0], client.tokens_out - spent[1], stopped)


async def _then(bar: "tqdm[Any]", step: float, work: Coroutine[Any, Any, None]) -> None:
    """Do the work and move the bar on."""
    await work
    bar.update(step)


async def _explain(job: Job, client: ChatClient, target: Target, examples: dict[int, list[Example]]) -> None:
    feature, pole = target
    windows = active_windows(examples.get(feature, []), pole, "explain")
    if not windows:
        return
    try:
        text, _ = await explainer.explain(client, job.store, windows)
    except (AskError, ParseError) as error:
        job.fail(target, str(error))
    else:
        job.explain(target, text, load_prompt("explain").version)


async def _score(
    job: Job,
    client: ChatClient,
    target: Target,
    examples: dict[int, list[Example]],
    texts: dict[Target, str],
    options: DetectionOptions,
    gate: asyncio.Semaphore,
) -> None:
    """Judge the target's explanation and a control on the same windows; nothing is stored when half went unanswered."""
    feature, _ = target
    held_out = draw_held_out(job.store, target, examples.get(feature, []), options)
    if held_out is None:
        return
    own = texts[target]
    other = pick_control(target, texts) or pick_control(target, {target: own} | _stored_texts(job.store))
    async with gate:
        mine = await detection.judge(client, job.store, own, held_out, options.batch)
        control = await detection.judge(client, job.store, other, held_out, options.batch) if other else None
    cost = mine.cost_tokens + (control.cost_tokens if control else 0)
    measured = False
    for scorer, measure in ((DETECTION, detection.accuracy), (detection.AUROC, detection.ranking)):
        if estimate := measure(mine, held_out, seed=feature):
            against = measure(control, held_out, seed=feature) if control else None
            value = against.value if against else None
            job.score(
                target, scorer, estimate, control=value, judge=client.model, failures=mine.failures, cost_tokens=cost
            )
            measured, cost = True, 0
    if not measured:
        job.fail(target, f"{mine.failures} of {len(held_out.token_ids)} windows got no answer")


def draw_held_out(store: Store, target: Target, examples: list[Example], options: DetectionOptions) -> HeldOut | None:
    """Windows of the score split in random order: active ones from over the range of strengths, and ones that are off.

    None when there are too few of a kind.
    """
    feature, pole = target
    active = spread(active_windows(examples, pole, "score"), options.n_active)
    off = store.background(feature, options.n_off, "score", seed=feature, active=False)
    if min(len(active), len(off)) < MIN_WINDOWS:
        return None
    windows = [*active, *off]
    order = np.random.default_rng([feature, pole == "-"]).permutation(len(windows))
    return HeldOut(
        docs=[windows[i].doc for i in order],
        token_ids=[windows[i].token_ids for i in order],
        active=order < len(active),
    )


def _stored_texts(store: Store) -> dict[Target, str]:
    """All explanations in the store: where the control comes from when a block has a single feature."""
    return {(e.feature, e.pole): e.text for e in reversed(store.explanations())}
