"""The one palette: Streamlit's theme on the command line, CSS variables on the pages, and the colours of the charts.

Orange is a positive value and blue a negative one everywhere (a pair that every kind of colour blindness keeps apart);
the accent is neither. Given as options, because a `.streamlit/config.toml` would have to lie in the user's folder.
"""

from typing import NamedTuple


class Tone(NamedTuple):
    """One colour in both modes."""

    light: str
    dark: str


PAPER = Tone("#ffffff", "#101318")
PANEL = Tone("#f5f6f8", "#191e25")
INK = Tone("#1b2027", "#e4e8ed")
MUTED = Tone("#5d6773", "#98a3b0")
LINE = Tone("#e2e5e9", "#2b323b")
ACCENT = Tone("#0b7a75", "#3fc1b8")
POSITIVE = Tone("#ff9d3c", "#b3560a")
"""Behind a token, under ink-coloured text: contrast at least 4.5 at full strength."""
NEGATIVE = Tone("#74b8f7", "#1f5fbf")
POSITIVE_BAR = Tone("#e07b12", "#ee9440")
"""In charts and bars, beside paper."""
NEGATIVE_BAR = Tone("#2f7fd0", "#62aaf0")
SERIES = ("#2f7fd0", "#e07b12", "#159a92", "#a866d6", "#d0487d", "#8b8f1f", "#8a97a6", "#b5714a")
"""Lines of a chart, in both modes: each stands out on either paper."""

_VARIABLES = {
    "paper": PAPER,
    "panel": PANEL,
    "ink": INK,
    "muted": MUTED,
    "line": LINE,
    "accent": ACCENT,
    "pos": POSITIVE,
    "neg": NEGATIVE,
    "pos-bar": POSITIVE_BAR,
    "neg-bar": NEGATIVE_BAR,
}

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<g fill="none" stroke="#0b7a75" stroke-width="2"><path d="M7 16 24 6M7 16h18M7 16l17 10"/></g>'
    '<circle cx="7" cy="16" r="5" fill="#0b7a75"/><circle cx="25" cy="6" r="4" fill="#e07b12"/>'
    '<circle cx="26" cy="16" r="3" fill="#98a3b0"/><circle cx="25" cy="26" r="4" fill="#2f7fd0"/></svg>'
)
"""The picture in the browser's tab; inline, because Streamlit would fetch a named icon from the network."""


def css_variables() -> str:
    """CSS that names each colour `--NAME`; the browser takes the light or the dark one by the page's color-scheme."""
    lines = (f"--{name}: light-dark({tone.light}, {tone.dark});" for name, tone in _VARIABLES.items())
    return ".stApp {" + " ".join(lines) + "}"


def streamlit_options() -> list[str]:
    """The theme as options of `streamlit run`, for light and dark; the browser's own preference chooses."""
    colours = {
        "primaryColor": ACCENT,
        "backgroundColor": PAPER,
        "secondaryBackgroundColor": PANEL,
        "textColor": INK,
        "linkColor": ACCENT,
        "borderColor": LINE,
        "dataframeBorderColor": LINE,
    }
    options = [f"--theme.{mode}.{key}={getattr(tone, mode)}" for key, tone in colours.items() for mode in Tone._fields]
    return [*options, "--theme.baseFontSize=15", "--theme.baseRadius=6px", "--theme.showWidgetBorder=true"]
