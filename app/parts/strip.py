"""The token strip: rows of tokens, each coloured by its signed value relative to the feature's maximum.

One `st.html` call takes all rows; hundreds of calls would be slow. Hovering a token shows it with its value. Colour is
not the only sign: negative tokens are underlined, the peak is bold, and each row gives its peak value in figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.parts.markup import esc

Tip = Literal["data-v", "title"]
"""`data-v`: shown at once by the style sheet. `title`: shown by whatever reads HTML, without a style sheet too; left
out where the value is 0, as at most tokens: that is a quarter of a file."""
FAINTEST = 12  # per cent of colour at the smallest non-zero value: just visible on paper


@dataclass(frozen=True, kw_only=True)
class Row:
    """One window of text with a feature's value at each token."""

    pieces: Sequence[str]
    """Display text of each token; '' where a character that several tokens share went to the first of them."""
    acts: Sequence[float]
    """Signed value of the feature at each token, 0 where it is off."""
    peak_index: int
    """Token with the largest |value|."""
    origin: str = ""
    """Where the text is from, such as "document 12"; shown on hovering the peak value."""

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.acts):
            raise ValueError(f"A row has {len(self.pieces)} tokens but {len(self.acts)} values: expected one a token.")

    @property
    def peak(self) -> float:
        return float(self.acts[self.peak_index]) if self.acts else 0.0


def rows_html(rows: Sequence[Row], scale: float, around: int | None = None, tip: Tip = "data-v") -> str:
    """HTML of the rows.

    scale: |value| that gets the full colour: the feature's largest |value| over the corpus, so that rows compare.
    around: show only this many tokens on either side of the peak; None shows all.
    tip: the attribute that holds what hovering a token shows.
    """
    return "".join(_row(row, scale, around, tip) for row in rows)


def _row(row: Row, scale: float, around: int | None, tip: Tip) -> str:
    first, last = 0, len(row.pieces)
    if around is not None:
        first, last = max(0, row.peak_index - around), min(last, row.peak_index + around + 1)
    tokens = "".join(
        _token(row.pieces[i], float(row.acts[i]), scale, i == row.peak_index and row.acts[i] != 0, tip)
        for i in range(first, last)
    )
    tokens = tokens.lstrip(" ")  # rows begin at one edge; the blank is in the token's tip
    before = '<span class="cut">\u2026</span>' if first > 0 else ""
    after = '<span class="cut">\u2026</span>' if last < len(row.pieces) else ""
    sign = "neg" if row.peak < 0 else "pos" if row.peak > 0 else "off"
    title = f' title="{esc(row.origin)}"' if row.origin else ""
    peak = f'<span class="peak {sign}"{title}>{number(row.peak)}</span>'
    return f'<div class="strip">{peak}<div class="tokens" dir="auto">{before}{tokens}{after}</div></div>'


def _token(piece: str, act: float, scale: float, is_peak: bool, tip: Tip) -> str:
    about = f'{tip}="{tip_text(piece)}  {number(act)}"'
    # A blank before a word stays outside, so that no line ends in a sliver of colour.
    word = piece if piece.isspace() else piece.lstrip(" ")
    blank = piece[: len(piece) - len(word)]
    if act == 0:
        return f"{blank}<i{f' {about}' if tip == 'data-v' else ''}>{shown(word)}</i>"
    strength = min(1.0, abs(act) / scale) if scale > 0 else 1.0
    percent = round(FAINTEST + (100 - FAINTEST) * strength)
    style = ("n" if act < 0 else "p") + (" top" if is_peak else "") + (" part" if piece == "" else "")
    return f'{blank}<i class="{style}" style="--a:{percent}%" {about}>{shown(word)}</i>'


def shown(piece: str) -> str:
    """A token as HTML in running text: line breaks and tabs get a mark, and so do spaces that stand alone."""
    if piece == "":
        return ""
    if piece.startswith("<|") and piece.endswith("|>"):  # a special token by its name
        return _mark(piece)
    if piece.isspace():
        return _mark(piece.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5"))
    return "".join(_mark({"\n": "\u21b5", "\t": "\u21e5"}[c]) if c in "\n\t" else esc(c) for c in piece)


def tip_text(piece: str) -> str:
    """A token as attribute text with every space visible."""
    if piece == "":
        return "(rest of a character)"
    return esc(piece.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5"))


def _mark(text: str) -> str:
    return f'<b class="ws">{esc(text)}</b>'


def number(value: float) -> str:
    """Three significant figures, kept when they are zeros so that columns line up; a true minus sign."""
    if value == 0:
        return "0"
    text = f"{value:#.3g}".removesuffix(".") if abs(value) < 999.5 else f"{value:,.0f}"
    return text.replace("-", "\u2212")
