"""Asks a language model for one short phrase about the windows that a feature fires in.

It sees windows of the explain split: the strongest ones, and some from over the whole range, because an explanation of
the very top alone is often too narrow. Firing tokens stand in << >>. The reply is read leniently (models wrap JSON in
prose and fences), and a reply without a phrase is a failure that is counted: it never becomes an explanation.
Source: Bills et al. 2023, "Language models can explain neurons in language models"; marks as in Paulo et al. 2024,
arXiv:2410.13928.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from autointerp.client import ChatClient, Reply
from autointerp.prompt import load_prompt
from autointerp.windows import ActiveWindow, spread
from data.store import Store

EXPLAINER = "max-activating"
N_TOP = 4
N_OTHERS = 2
N_WORDS = 8
_MAX_TOKENS = 60
_MAX_LENGTH = 200
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"explanation": {"type": "string", "maxLength": 100}},
    "required": ["explanation"],
    "additionalProperties": False,
}
_NO_PHRASE = re.compile(r"(i|sorry|sure|certainly|here|as an|error|null|none)\b", re.IGNORECASE)  # talk about it


class ParseError(Exception):
    """The model answered, but not with what was asked for; the reason is one line."""


async def explain(client: ChatClient, store: Store, windows: Sequence[ActiveWindow]) -> tuple[str, Reply]:
    """Ask for an explanation of one pole; windows: where it fires, explain split, strongest first.

    Returns the phrase and the reply. Raises ParseError, and what `ChatClient.ask` raises.
    """
    chosen = choose(windows)
    shown = "\n".join(f"{i}. {render(store, window)}" for i, window in enumerate(chosen, start=1))
    messages = load_prompt("explain").messages(words=firing_words(store, chosen), windows=shown)
    reply = await client.ask(messages, max_tokens=_MAX_TOKENS, schema=SCHEMA)
    return parse_explanation(reply.text), reply


def choose(windows: Sequence[ActiveWindow]) -> list[ActiveWindow]:
    """The strongest windows, and some from over the rest of the range, in that order."""
    return [*windows[:N_TOP], *spread(windows[N_TOP:], N_OTHERS)]


def firing_words(store: Store, windows: Sequence[ActiveWindow]) -> str:
    """The tokens that are marked in the windows, most frequent first: small models lose sight of them in the text."""
    marked = Counter(
        plain(text).strip()
        for window in windows
        for text, mark in zip(store.token_texts(window.token_ids), window.marked(), strict=True)
        if mark
    )
    return ", ".join([word for word, _ in marked.most_common() if word][:N_WORDS])


def render(store: Store, window: ActiveWindow) -> str:
    """The window on one line, runs of firing tokens as <<run>>."""
    pieces, inside = [], False
    for text, mark in zip(store.token_texts(window.token_ids), window.marked(), strict=True):
        pieces += ["<<"] * (mark and not inside) + [">>"] * (inside and not mark) + [plain(text)]
        inside = mark
    return "".join(pieces) + ">>" * inside


def plain(text: str) -> str:
    """Text from a corpus on one line."""
    return text.replace("\n", "\\n").replace("\r", "")


def parse_explanation(reply: str) -> str:
    """The phrase in a reply: the `explanation` of its JSON, wherever that stands, or a single short plain line.

    Raises ParseError when there is none: no text, a form that was left empty, prose, a page of HTML.
    """
    found = _from_json(reply)
    if found is None:
        found = re.sub(r"^\W*(?:the )?explanation\W*:\s*", "", reply.strip(), flags=re.IGNORECASE)
        if len(found) > _MAX_LENGTH or any(mark in reply.strip() for mark in "\n{}<>") or _NO_PHRASE.match(found):
            raise ParseError("the reply holds no explanation")
    phrase = " ".join("".join(c if c.isprintable() else " " for c in found).replace("<<", "").replace(">>", "").split())
    phrase = phrase.strip("\"'“”` ").removesuffix(".")
    if not any(c.isalnum() or not c.isascii() for c in phrase):
        raise ParseError("the explanation is empty")
    words = phrase.casefold().split()
    if len(words) > 6 and len(set(words)) <= len(words) / 2:
        raise ParseError("the reply only repeats itself")
    if phrase.casefold() in _examples():
        raise ParseError("the reply repeats the prompt's example")
    if len(phrase) > _MAX_LENGTH:
        raise ParseError(f"the explanation has {len(phrase)} characters, more than {_MAX_LENGTH}")
    return phrase


@lru_cache
def _examples() -> set[str]:
    """The explanations that the prompt itself shows: weak models hand them back."""
    parts = load_prompt("explain").parts
    return {phrase.casefold() for role, text in parts if role == "assistant" and (phrase := _from_json(text))}


def _from_json(reply: str) -> str | None:
    decoder = json.JSONDecoder(strict=False)
    for brace in itertools.islice(re.finditer(r"\{", reply), 100):
        try:
            value, _ = decoder.raw_decode(reply, brace.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(phrase := value.get("explanation"), str):
            return phrase
    return None
