"""Detection: a language model reads an explanation and unmarked windows, and says where the feature fires.

The windows are of the score split, some in which the feature fires (over its whole range of strengths) and some
verified to be off, shuffled. By default one window a request: a batch tells the base rate away. The value is balanced
accuracy, so an answerer that always says the same gets 0.5; the control asks the same windows about another feature's
explanation, which shows what an answerer gets who only likes or dislikes a text. Where the server gives
log-probabilities, an answer is P(yes) / (P(yes) + P(no)), and the AUROC of that is a second score: weak judges often
rank better than they decide.
Source: Paulo et al. 2024, arXiv:2410.13928, sec. 3.3. Differs: split by document, intervals, control.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autointerp.client import AskError, ChatClient, Message, Reply, TokenChoice, settle
from autointerp.explainers.llm import plain
from autointerp.prompt import Prompt, load_prompt
from autointerp.stats import Estimate, auroc, balanced_accuracy
from autointerp.windows import HeldOut
from data.store import Store

AUROC = "detection-auroc"
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """How many windows are judged."""

    n_active: int = 10
    n_off: int = 10
    batch: int = 1
    """Windows in a request, 1 to 5."""

    def __post_init__(self) -> None:
        if min(self.n_active, self.n_off) < 1 or not 1 <= self.batch <= 5:
            raise ValueError(f"{self} is out of range: expected windows of both kinds and a batch of 1 to 5.")


QUICK = DetectionOptions(n_active=5, n_off=5)
"""For the model on this machine: some 4 s a feature on two cores, and wide intervals."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The answers about one explanation: for each window P(yes), 0 or 1 without log-probabilities, NaN unanswered."""

    yes: np.ndarray
    graded: bool
    """Whether the answers are probabilities."""
    failures: int
    cost_tokens: int


def accuracy(judgement: Judgement, held_out: HeldOut, seed: int) -> Estimate | None:
    """Balanced accuracy over the answered windows; None when over half are not, or a class has none left."""
    if (answered := _answered(judgement, held_out)) is None:
        return None
    return balanced_accuracy(judgement.yes[answered] > 0.5, held_out.active[answered], seed)


def ranking(judgement: Judgement, held_out: HeldOut, seed: int) -> Estimate | None:
    """AUROC of P(yes) over the answered windows; None without probabilities, and where `accuracy` is None."""
    if (answered := _answered(judgement, held_out)) is None or not judgement.graded:
        return None
    return auroc(judgement.yes[answered], held_out.active[answered], seed)


def _answered(judgement: Judgement, held_out: HeldOut) -> np.ndarray | None:
    answered = ~np.isnan(judgement.yes)
    both = len(set(held_out.active[answered].tolist())) == 2
    return answered if both and 2 * answered.sum() >= len(answered) else None


async def judge(client: ChatClient, store: Store, explanation: str, held_out: HeldOut, batch: int = 1) -> Judgement:
    """Ask about all windows. A request that fails leaves its windows unanswered; raises what stops every request."""
    prompt = load_prompt("detect")
    starts = range(0, len(held_out.token_ids), batch)
    groups = [[show(store, ids) for ids in held_out.token_ids[start : start + batch]] for start in starts]
    replies = await settle([_ask(client, prompt, explanation, group) for group in groups])
    yes, graded, cost, unanswered = [], True, 0, 0
    for group, reply in zip(groups, replies, strict=True):
        answers = parse_answers(reply, len(group)) if reply else None
        unanswered += len(group) if answers is None else 0
        yes += answers or [math.nan] * len(group)
        graded = graded and (answers is None or bool(reply and reply.choices))
        cost += reply.tokens_in + reply.tokens_out if reply else 0
    return Judgement(yes=np.array(yes), graded=graded, failures=unanswered, cost_tokens=cost)


def show(store: Store, token_ids: Sequence[int]) -> str:
    """A window as the judge reads it: one line, no marks."""
    return plain("".join(store.token_texts(token_ids))).strip()


def parse_answers(reply: Reply, n: int) -> list[float] | None:
    """P(yes) for each of `n` windows; None when the reply does not answer exactly n times."""
    places = [choice for choice in reply.choices if _answer_word(choice.token)]
    if n == 1 and not places:
        places = list(reply.choices[:1])  # the first word is another, but yes and no were weighed for its place
    if len(places) == n and None not in (graded := [_p_yes(place) for place in places]):
        return [p for p in graded if p is not None]
    words = _WORD.findall(reply.text)
    return [float(word.lower() == "yes") for word in words] if len(words) == n else None


async def _ask(client: ChatClient, prompt: Prompt, explanation: str, group: list[str]) -> Reply | None:
    try:
        return await client.ask(_messages(prompt, explanation, group), max_tokens=3 * len(group), logprobs=True)
    except AskError:
        return None


def _messages(prompt: Prompt, explanation: str, group: list[str]) -> list[Message]:
    numbers = [f" {i}" if len(group) > 1 else "" for i in range(1, len(group) + 1)]
    shown = "\n".join(f"Excerpt{number}: {text}" for number, text in zip(numbers, group, strict=True))
    return prompt.messages(explanation=explanation, windows=shown)


def _answer_word(token: str) -> str | None:
    word = token.strip(" \n\t\"'*.,:▁Ġ").lower()
    return word if word in ("yes", "no") else None


def _p_yes(place: TokenChoice) -> float | None:
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in place.top:
        if word := _answer_word(token):
            mass[word] += math.exp(min(logprob, 0.0))
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 and math.isfinite(total) else None
