"""Links between pages that keep the session: a click on `<a class="go" href="feature?...">` becomes a page switch.

The links are real ones, so opening in a new tab, copying the address and a browser without scripts work as ever. What
comes back from the browser is an address like any that a person could type: it is taken apart, and the page checks it.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import streamlit as st

_CATCH = """
export default function (component) {
  const follow = (event) => {
    const link = event.target.closest && event.target.closest("a.go");
    if (!link || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    component.setTriggerValue("go", link.getAttribute("href"));
  };
  document.addEventListener("click", follow, true);
  return () => document.removeEventListener("click", follow, true);
}
"""


def follow_links(pages: Mapping[str, Any]) -> None:
    """Switch to the page of a clicked link. Called once a run by the router.

    pages: url path -> the st.Page of the navigation.
    """
    catch = st.components.v2.component("sae_links", html="<i></i>", js=_CATCH, isolate_styles=False)
    with st.container(key="links"):
        clicked = catch(key="links_catch", on_go_change=_nothing)
    target = split_link(clicked.go) if clicked.go else None
    if target is not None and target[0] in pages:
        st.switch_page(pages[target[0]], query_params=target[1])


def split_link(address: object) -> tuple[str, dict[str, str]] | None:
    """("feature", {"run": ...}) of "feature?run=..."; None for anything that is no relative link of ours."""
    if not isinstance(address, str) or len(address) > 4000:
        return None
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or not parts.path.replace("_", "").isalpha():
        return None
    return parts.path, dict(parse_qsl(parts.query))


def _nothing() -> None:
    """A trigger needs a callback to be declared; the work is done where the value is read."""
