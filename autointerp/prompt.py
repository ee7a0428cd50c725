"""Prompts are files in `prompts/`, and a prompt's version is the hash of its file.

The version is stored with every explanation, so that a changed word in a prompt is never mistaken for the old one.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from autointerp.client import Message


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt file: chat messages under `## system`, `## user` and `## assistant`; the last has {name} to fill in."""

    version: str
    """First 12 digits of the file's SHA-256."""
    parts: tuple[tuple[str, str], ...]
    """(role, text) in order."""

    def messages(self, **fields: str) -> list[Message]:
        """The chat messages. What is filled in is text from outside: braces in it stay as they are."""
        role, last = self.parts[-1]
        assert all(last.count(f"{{{name}}}") == 1 for name in fields), f"the prompt lacks one of {list(fields)}"
        filled = [*self.parts[:-1], (role, _fill(last, fields))]
        return [{"role": role, "content": text} for role, text in filled]


@lru_cache
def load_prompt(name: str) -> Prompt:
    """Read `prompts/NAME.md`."""
    text = (files("autointerp") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    _, *pieces = re.split(r"^## (system|user|assistant)\n", text, flags=re.MULTILINE)
    parts = tuple((role, part.strip()) for role, part in zip(pieces[::2], pieces[1::2], strict=True))
    return Prompt(version=hashlib.sha256(text.encode()).hexdigest()[:12], parts=parts)


def _fill(template: str, fields: dict[str, str]) -> str:
    """Replace each {name} once, from left to right, so that a filled-in text is never searched for further places."""
    done, rest = "", template
    for name in sorted(fields, key=lambda name: template.index(f"{{{name}}}")):
        before, rest = rest.split(f"{{{name}}}", 1)
        done += before + fields[name]
    return done + rest
