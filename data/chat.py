"""Dialogues to contexts: each goes through the model's own chat template and is a sequence of its own, never packed.

Every token knows who says it. The template's literal text is learned by rendering the dialogue with its contents
replaced by marks; what lies between is content, found by its place and not by searching for it, so a content such as
"user" confuses nothing. A dialogue that spells out a control token (`<|im_start|>`) would fake a turn: it is left out.
Some templates print today's date; here it is always 26 Jul 2024, or no run could be repeated.

Source: Li et al. 2025 (FAST), arXiv:2506.07691, sec. 3: dialogues are forwarded one by one and truncated.
"""

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .corpora import CorpusError, Row, check_whole, first_line, no_column, read_rows
from .tokens import Context, batches, check_sizes, up_to

ROLES = ("template", "system", "user", "assistant", "tool")
"""Who says a token; `Context.roles` holds indices into this. `template`: nobody, the template adds it."""

_SHAREGPT = {"human": "user", "gpt": "assistant"}
_COLUMNS = ("messages", "conversations")
_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters: no template has them
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"  # the newline belongs to the tag


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a transformers fast tokenizer that is used here."""

    chat_template: Any

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Dialogue:
    id: int
    """Position in the corpus."""
    messages: list[dict[str, str]]
    """At least one, each {"role": one of ROLES but the first, "content": text}."""
    where: str
    """For messages: the file and line, or the row."""


def read_dialogues(
    name: str, *, revision: str | None = None, split: str = "train", messages_column: str | None = None
) -> Iterator[Dialogue]:
    """The dialogues of a corpus, in order, without those of no message.

    name, revision, split: as in `data.corpora.read_corpus`; JSON lines, Parquet and Hub datasets can hold dialogues.
    messages_column: the column with the list of messages, {role, content} or {from, value}; None takes `messages`,
    else `conversations`. Only these two keys of a message are used.
    Raises CorpusError; at once for a name that leads nowhere, else where the fault is met.
    """
    columns = _COLUMNS if messages_column is None else (messages_column,)
    return _dialogues(read_rows(name, columns, revision=revision, split=split), name, columns)


def chat(
    dialogues: Iterable[Dialogue],
    tokenizer: ChatTokenizer,
    *,
    context: int,
    n_tokens: int | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[Context]:
    """A context for each dialogue: what the chat template makes of it, cut to `context` tokens, with roles.

    A token that overlaps a content has its message's role, any other one is `template`: turn marks, role names, and a
    system prompt that the template adds by itself.
    n_tokens: stop before the first dialogue with which there would be more (None: at the end of `dialogues`).
    warn: receives one line at the end when dialogues were left out for spelling out a control token.
    The same dialogues and tokenizer give the same contexts. Only a batch of dialogues is in memory at a time.
    Raises CorpusError, at once for a tokenizer without a chat template, else for a dialogue that the template refuses
    or changes other than by stripping its contents; ValueError, at once, for sizes that leave no context.
    """
    check_sizes(context, n_tokens)
    if tokenizer.chat_template is None:
        raise CorpusError(
            "the tokenizer has no chat template, expected that of a chat model: "
            "choose such a model, or read the corpus as plain text."
        )
    return _chat(dialogues, tokenizer, context, n_tokens, warn)


@dataclass(slots=True)
class _Count:
    read: int = 0
    left_out: int = 0
    first_left_out: str = ""
    """Where."""


class _Rendered(NamedTuple):
    dialogue: Dialogue
    text: str
    spans: list[tuple[int, int, int]]
    """(start, end, role) of each content that is not empty, in the order of the text."""


def _chat(
    dialogues: Iterable[Dialogue],
    tokenizer: ChatTokenizer,
    context: int,
    n_tokens: int | None,
    warn: Callable[[str], object],
) -> Iterator[Context]:
    count = _Count()
    empty = True
    for each in up_to(n_tokens, _contexts(_rendered(dialogues, tokenizer, count), tokenizer, context)):
        empty = False
        yield each
    if not count.left_out:
        return
    said = (
        f"{count.left_out:,} of the {count.read:,} dialogues read spell out a control token, the first in "
        f"{count.first_left_out}"
    )
    if empty:
        raise CorpusError(f"{said}, expected some without: remove those tokens from the contents.")
    warn(f"{said}: they were left out.")


def _contexts(rendered: Iterable[_Rendered], tokenizer: ChatTokenizer, context: int) -> Iterator[Context]:
    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.post_processor = None  # it may trim blanks off the offsets, and adds nothing that is wanted here
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = False
    for batch in batches(rendered, lambda each: len(each.text)):
        for each, row in zip(
            batch, encoder.encode_batch([each.text for each in batch], add_special_tokens=False), strict=True
        ):
            ids = np.array(row.ids[:context], np.int32)
            roles = _roles(np.array(row.offsets[:context], np.int64).reshape(-1, 2), each.spans)
            yield Context(ids, np.full(len(ids), each.dialogue.id, np.int32), roles)


def _roles(offsets: np.ndarray, spans: list[tuple[int, int, int]]) -> np.ndarray:
    """The role of each token: of the first span that it overlaps, else 0."""
    start, end = offsets.T
    starts, ends, roles = np.array([*spans, (1 << 62, 1 << 62, 0)]).T
    span = np.searchsorted(ends, start, side="right")  # the first one that is not over before the token
    return np.where(starts[span] < end, roles[span], 0).astype(np.int8)


def _rendered(dialogues: Iterable[Dialogue], tokenizer: ChatTokenizer, count: _Count) -> Iterator[_Rendered]:
    template = tokenizer.get_chat_template()
    control = _control_tokens(tokenizer, template)
    if "strftime_now" in template:
        template = _FIXED_DATE + template

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    @functools.lru_cache(maxsize=1024)
    def pieces(shape: tuple[tuple[str, bool], ...]) -> list[str]:
        """Literal text, number of a message, literal text, ..., literal text; empty contents are no messages here."""
        marks = [{"role": role, "content": f"\ue000{i}\ue001" if full else ""} for i, (role, full) in enumerate(shape)]
        return _MARK.split(render(marks))

    for dialogue in dialogues:
        count.read += 1
        if any(control.search(message["content"]) for message in dialogue.messages):
            count.left_out += 1
            count.first_left_out = count.first_left_out or dialogue.where
            continue
        try:
            text = render(dialogue.messages)
            parts = pieces(tuple((message["role"], bool(message["content"])) for message in dialogue.messages))
        except Exception as error:  # whatever a template raises: it may ask for turns to alternate, or know no system
            raise CorpusError(
                f"{dialogue.where} is refused by the chat template ({first_line(error)}), expected a dialogue as the "
                "model knows them: remove or mend it."
            ) from None
        spans = _spans(text, parts, dialogue.messages)
        if spans is None:
            raise CorpusError(
                f"{dialogue.where} has a content that the chat template changes or drops, expected one that it keeps, "
                "or strips of blanks at its ends: remove or mend the dialogue."
            )
        yield _Rendered(dialogue, text, spans)


def _spans(text: str, pieces: list[str], messages: list[dict[str, str]]) -> list[tuple[int, int, int]] | None:
    """Where each content lies in `text`; None when that is no sum of the pieces and the contents."""
    spans = []
    literals, numbers = pieces[::2], [int(number) for number in pieces[1::2]]
    at = len(literals[0])
    if not text.startswith(literals[0]) or set(numbers) != {i for i, m in enumerate(messages) if m["content"]}:
        return None
    for number, literal in zip(numbers, literals[1:], strict=True):
        role, content = messages[number]["role"], messages[number]["content"]
        if not text.startswith(content + literal, at):
            content = content.strip()
            if not text.startswith(content + literal, at):
                return None
        if content:
            spans.append((at, at + len(content), ROLES.index(role)))
        at += len(content) + len(literal)
    return spans if at == len(text) else None


def _control_tokens(tokenizer: ChatTokenizer, template: str) -> re.Pattern[str]:
    """Matches what no content may spell out: special tokens, and added ones that the template uses (not blanks).

    `all_special_tokens` alone is too few: Llama 3's `<|start_header_id|>` is not among them.
    """
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (token.content in template and not token.content.isspace()):
            found.add(token.content)
    return re.compile("|".join(re.escape(token) for token in sorted(found - {""})) or r"(?!)")


def _dialogues(rows: Iterator[Row], name: str, columns: tuple[str, ...]) -> Iterator[Dialogue]:
    empty, position = True, -1
    for position, row in enumerate(rows):
        column = next((column for column in columns if column in row.values), None)
        if column is None:
            raise no_column(row, " or ".join(map(repr, columns)), "messages")
        messages = row.values[column]
        if messages is None:
            continue
        if not isinstance(messages, list):
            raise CorpusError(
                f"{row.where} has a {type(messages).__name__} in {column!r}, expected a list of messages: "
                "set messages_column to another."
            )
        if messages:
            empty = False
            yield Dialogue(position, [_message(each, i, row, column) for i, each in enumerate(messages, 1)], row.where)
    if empty:
        raise CorpusError(
            f"{name!r} has no dialogue in its {position + 1} rows, expected at least one: choose another corpus."
        )


def _message(message: Any, number: int, row: Row, column: str) -> dict[str, str]:
    where = f"{row.where} has in message {number} of {column!r}"
    if not isinstance(message, dict):
        raise CorpusError(f"{where} a {type(message).__name__}, expected {{role, content}}: mend the row.")
    for of, what in (("role", "content"), ("from", "value")):
        if of in message and what in message:
            role, content = message[of], message[what]
            break
    else:
        keys = ", ".join(map(str, message)) or "(none)"
        raise CorpusError(f"{where} the keys {keys}, expected role and content, or from and value: rename them.")
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES[1:]:
        raise CorpusError(f"{where} the role {role!r}, expected one of {', '.join(ROLES[1:])}: rename it.")
    if not isinstance(content, str):
        raise CorpusError(f"{where} a {type(content).__name__} as {what}, expected text: remove or mend the row.")
    check_whole(content, row, column)
    return {"role": role, "content": content}
