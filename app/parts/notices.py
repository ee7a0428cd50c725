"""Empty states and error lines: what is missing, why, and the command that makes it."""

import streamlit as st

from app.parts.markup import code, esc
from app.runs import Dictionary, sae
from data.store import StoreError


def empty_html(what: str, why: str, command: str | None = None) -> str:
    """A page or panel that has nothing to show yet."""
    todo = f'<div class="cmd">{code(command)}</div>' if command else ""
    return f'<div class="empty"><b>{esc(what)}</b><p>{esc(why)}</p>{todo}</div>'


def empty(what: str, why: str, command: str | None = None) -> None:
    """Show an empty state; `command` is what to type next."""
    st.html(empty_html(what, why, command))


def wrong(what: str, message: str = "") -> None:
    """Show an error that the reader can act on: one bold line and a sentence."""
    st.html(f'<div class="notice wrong" role="alert"><b>{esc(what)}</b>{esc(message)}</div>')


def note(what: str, message: str = "") -> None:
    """Show a remark."""
    st.html(f'<div class="notice"><b>{esc(what)}</b>{esc(message)}</div>')


def no_store(dictionary: Dictionary, error: StoreError) -> None:
    """Say why a dictionary's feature store cannot be shown: there is none yet, or `error`."""
    if dictionary.has_store:
        wrong("The feature store cannot be read", str(error))
    else:
        why = f"{dictionary.address} has been trained, but not yet been run over text for examples and figures:"
        empty("No feature store yet", why, sae("index", dictionary.address))
