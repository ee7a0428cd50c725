"""The job without a language model: a rule for every feature, judged on unseen windows by applying it."""

from collections.abc import Sequence

from tqdm import tqdm

from autointerp.explainers import lexical as explainer
from autointerp.explainers.lexical import WindowSample
from autointerp.job import MIN_WINDOWS, Job, LabelReport, Target, blocks, pick_control
from autointerp.rules import Rule, Vocabulary
from autointerp.scorers import lexical as scorer_of_rules
from autointerp.windows import active_windows, poles
from data.store import DETECTION, Example, Store

_BLOCK = 512


def label_by_rules(store: Store, features: Sequence[int], *, scorer: bool, redo: bool) -> LabelReport:
    """Explain `features` by rules and, with `scorer`, score what has windows enough."""
    job = Job(store, source="lexical", explainer=explainer.EXPLAINER, model="", redo=redo)
    vocabulary = Vocabulary(store.vocab)
    seen, unseen = (WindowSample(vocabulary, store.sample(split)) for split in ("explain", "score"))
    n_targets = 0
    with tqdm(total=len(features), desc="explaining by rules", unit="feature", disable=None) as bar:
        for block in blocks(features, _BLOCK):
            examples, active = store.examples_of(block), store.sample_active(block)
            targets = [(feature, pole) for feature in block for pole in poles(examples.get(feature, []))]
            n_targets += len(targets)
            rules = {target: _rule(job, target, examples, active, seen) for target in targets}
            rules = {target: rule for target, rule in rules.items() if not rule.empty}
            if scorer:
                for target in filter(job.lacks_score, targets):
                    _score(job, target, rules, examples, active, unseen)
            bar.update(len(block))
    job.flush()
    return job.report(n_targets)


def _rule(
    job: Job, target: Target, examples: dict[int, list[Example]], active: dict[int, list[int]], seen: WindowSample
) -> Rule:
    """The target's rule: the stored one, or one that is found and recorded now."""
    if target in job.known:
        return Rule.from_json(job.known[target].prompt_version)
    feature, pole = target
    windows = active_windows(examples.get(feature, []), pole, "explain")
    found = explainer.explain(windows, seen, seen.off(active.get(feature, [])))
    job.explain(target, found.text, found.rule.to_json())
    return found.rule


def _score(
    job: Job,
    target: Target,
    rules: dict[Target, Rule],
    examples: dict[int, list[Example]],
    active: dict[int, list[int]],
    unseen: WindowSample,
) -> None:
    """Score the target's rule, unless it has none or there are too few windows to say anything."""
    feature, pole = target
    windows = active_windows(examples.get(feature, []), pole, "score")
    off = unseen.off(active.get(feature, []))
    if target not in rules or min(len(windows), off.sum()) < MIN_WINDOWS:
        return
    estimate = scorer_of_rules.score(rules[target], windows, unseen, off, seed=feature)
    own = {target: rules[target]}
    control = pick_control(target, rules) or pick_control(target, own | _stored_rules(job))
    value = scorer_of_rules.score(control, windows, unseen, off).value if control else None
    job.score(target, DETECTION, estimate, control=value, judge=scorer_of_rules.JUDGE)


def _stored_rules(job: Job) -> dict[Target, Rule]:
    """All rules in the store: where the control comes from when a job has a single feature."""
    stored = [e for e in job.store.explanations() if e.source == "lexical" and e.explainer == explainer.EXPLAINER]
    rules = {(e.feature, e.pole): Rule.from_json(e.prompt_version) for e in stored}
    return {target: rule for target, rule in rules.items() if not rule.empty}
