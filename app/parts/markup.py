"""HTML from text that nobody vouches for: every label, token, name and explanation passes `esc` before it is markup.

Pages show foreign text only through `st.html` with these functions (or in widgets that take plain text): Streamlit's
own `st.markdown`, `st.title`, `st.error` ... would interpret Markdown in it. A test holds that.
"""

import html
import unicodedata
from collections.abc import Callable, Mapping
from urllib.parse import urlencode


def esc(text: object) -> str:
    """`text` as HTML text or attribute value; characters that would reorder or hide the text are made visible first."""
    return html.escape(visible(str(text)), quote=True)


def visible(text: str) -> str:
    """Replace control and invisible formatting characters by a visible stand-in; newline, tab and space are left.

    Right-to-left overrides would otherwise turn a whole row around, and zero-width characters would look like nothing.
    Joiners (U+200C, U+200D) stay: scripts and emoji need them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_stand_in(c) for c in text)


def _stand_in(c: str) -> str:
    if c in "\n\t\u200c\u200d":
        return c
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    if c == "\x7f":
        return "\u2421"
    if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp"):
        return f"\u27e8{ord(c):04X}\u27e9"
    return c


def href(page: str, query: Mapping[str, object]) -> str:
    """A link to a page of ours, relative to where the app is served, as an escaped attribute value."""
    return html.escape(f"{page}?{urlencode({k: str(v) for k, v in query.items()})}", quote=True)


def link(page: str, query: Mapping[str, object], inner: str, style: str = "") -> str:
    """`inner` (HTML already) as a link that `app.parts.links` follows inside the session."""
    return f'<a class="go {style}" href="{href(page, query)}">{inner}</a>'


Refer = Callable[[int, str, str], str]
"""refer(feature, inner, style): `inner` (HTML already) as a link to a feature, or in a box where none leads there."""


def in_app(query: Mapping[str, object]) -> Refer:
    """Links to the feature page. query: run and dictionary."""
    return lambda feature, inner, style: link("feature", {**query, "feature": feature}, inner, style)


def code(text: str) -> str:
    """A command or a name in fixed-width type."""
    return f"<code>{esc(text)}</code>"
