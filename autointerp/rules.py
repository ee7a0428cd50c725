"""Rules that a short phrase can state and a program can check: "token “ the”", "after “(”", "words that end in ing".

A rule looks at one token, either where the feature fires (`at`) or just before it (`after`), and is true or false of
each entry of the vocabulary; so testing it is a table lookup, and needs no language model. A rule is kept as JSON
beside its phrase: tokens by id, since two tokens can look alike in print.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

AFFIX_LENGTHS = range(2, 6)
_SHOWN = 4  # tokens that a phrase spells out

CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: text.strip().isdigit(),
    "capitalised words": lambda text: text.startswith(" ") and text[1:2].isupper() and not text[2:3].isupper(),
    "words in capitals": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "ends of words": lambda text: text.isalpha() and text.islower(),
    "punctuation": lambda text: bool(text.strip()) and all(_is_mark(c) for c in text.strip()),
    "line breaks": lambda text: "\n" in text,
    "blanks": lambda text: bool(text) and not text.strip(" \t"),
    "letters outside English": lambda text: any(c.isalpha() and not c.isascii() for c in text),
}
"""What a token's text can be, by the words that a phrase uses for it."""


class Vocabulary:
    """The texts of all tokens, and which of them a predicate is true of."""

    def __init__(self, entries: Sequence[bytes]) -> None:
        self._entries = entries
        self.texts = [entry.decode("utf-8", errors="replace") for entry in entries]
        self._masks: dict[str, Bool[np.ndarray, " vocab_and_1"]] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def with_affix(self, kind: Literal["prefix", "suffix"], text: str) -> list[int]:
        """Ids of the tokens whose text, blanks and case aside, begins or ends with `text` (`AFFIX_LENGTHS` letters)."""
        return self._affixes[kind].get(text, [])

    @cached_property
    def _affixes(self) -> dict[str, dict[str, list[int]]]:
        found: dict[str, dict[str, list[int]]] = {"prefix": {}, "suffix": {}}
        for id, text in enumerate(self.texts):
            for kind, affix in affixes(text):
                found[kind].setdefault(affix, []).append(id)
        return found

    def of_class(self, name: str) -> Bool[np.ndarray, " vocab_and_1"]:
        """Which entries belong to one of `CLASSES`; the last one, False, is what index -1 (no token) finds."""
        if name not in self._masks:
            self._masks[name] = np.array([*(CLASSES[name](text) for text in self.texts), False], dtype=bool)
        return self._masks[name]

    def quote(self, id: int) -> str:
        """A token in quotation marks: blanks counted, line breaks visible, parts of a character as bytes."""
        if not 0 <= id < len(self.texts):
            return f"“<{id}>”"
        if "\ufffd" in self.texts[id]:
            return f"bytes {self._entries[id].hex(' ')}"
        shown = self.texts[id].replace("\n", "⏎").replace("\t", "⇥")
        shown = re.sub(r"  +", lambda blanks: f"␣{len(blanks[0])}", shown)
        return "“" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown) + "”"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A predicate on a token. It is true of a window in which any token meets it."""

    place: Literal["at", "after"]
    """Whether the feature fires at the token, or on the one that follows it."""
    kind: Literal["tokens", "prefix", "suffix", "class"]
    tokens: tuple[int, ...] = ()
    """Token ids, for `tokens`; none of them makes a rule that is never true."""
    text: str = ""
    """The prefix or suffix (lower case), or a name from `CLASSES`."""

    @property
    def empty(self) -> bool:
        """Whether the rule is true of nothing, by its form."""
        return self.kind == "tokens" and not self.tokens

    def hits(self, vocabulary: Vocabulary, windows: Int[np.ndarray, "n time"]) -> Bool[np.ndarray, "n time"]:
        """Where in each window the feature should fire. windows: token ids, -1 behind the end of a short one.

        What stands before the first token of a window is unknown, so an `after` rule is never true there.
        """
        if self.kind == "class":
            found = vocabulary.of_class(self.text)[windows]
        else:
            ids = self.tokens if self.kind == "tokens" else vocabulary.with_affix(self.kind, self.text)
            found = np.isin(windows, ids)
        if self.place == "after":
            before = found
            found = np.zeros_like(before)
            found[:, 1:] = before[:, :-1] & (windows[:, 1:] >= 0)
        return found

    def phrase(self, vocabulary: Vocabulary) -> str:
        """The rule in words."""
        if self.kind == "tokens":
            quoted = [vocabulary.quote(id) for id in self.tokens[:_SHOWN]]
            more = len(self.tokens) - len(quoted)
            what = ", ".join(quoted) + (f" and {more} more" if more else "")
            noun = "token " if len(self.tokens) == 1 else "tokens "
            return noun + what if self.place == "at" else f"what follows {what}"
        end = {"prefix": "words that begin with ", "suffix": "words that end with "}
        named = f"{end[self.kind]}“{self.text}”" if self.kind in end else self.text
        return named if self.place == "at" else f"what follows {named}"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Rule":
        """Read `to_json`'s line back. Raises ValueError for anything else."""
        try:
            value = json.loads(text)
            rule = cls(place=value["place"], kind=value["kind"], tokens=tuple(value["tokens"]), text=value["text"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"{text[:80]!r} is no lexical rule: {error!r}") from None
        known = rule.place in ("at", "after") and rule.kind in ("tokens", "prefix", "suffix", "class")
        if not known or (rule.kind == "class" and rule.text not in CLASSES):
            raise ValueError(f"{text[:80]!r} is no lexical rule")
        return rule


def affixes(text: str) -> Iterator[tuple[Literal["prefix", "suffix"], str]]:
    """The beginnings and ends of a word that are shorter than the word; none for what holds other than letters."""
    word = text.strip().casefold()
    if word.isalpha():
        for n in AFFIX_LENGTHS:
            if n < len(word):
                yield "prefix", word[:n]
                yield "suffix", word[-n:]


def as_array(windows: Sequence[Sequence[int]]) -> Int[np.ndarray, "n time"]:
    """Windows of unequal length as one array, -1 behind the end of the short ones."""
    array = np.full((len(windows), max(map(len, windows), default=0)), -1, dtype=np.int64)
    for row, window in zip(array, windows, strict=True):
        row[: len(window)] = window
    return array


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"
