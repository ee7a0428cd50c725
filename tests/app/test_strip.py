"""The token strip says in colour, weight and figures what the values are, and is only ever text."""

import re

import pytest

from app.parts.strip import Row, number, rows_html


def strip(pieces: list[str], acts: list[float], scale: float = 4.0, around: int | None = None) -> str:
    peak = max(range(len(acts)), key=lambda i: abs(acts[i]))
    return rows_html([Row(pieces=pieces, acts=acts, peak_index=peak)], scale, around)


def colours(html: str) -> list[tuple[str, int]]:
    return [(style, int(percent)) for style, percent in re.findall(r'class="([pn][ a-z]*)" style="--a:(\d+)%"', html)]


def test_colour_is_relative_to_the_features_maximum_not_the_rows():
    assert colours(strip([" a", " b"], [1.0, 2.0], scale=4.0)) == [("p", 34), ("p top", 56)]
    assert colours(strip([" a", " b"], [1.0, 2.0], scale=2.0)) == [("p", 56), ("p top", 100)]


def test_a_value_above_the_maximum_gets_full_colour_and_the_smallest_is_still_visible():
    assert colours(strip([" a", " b"], [0.0001, 9.0], scale=4.0)) == [("p", 12), ("p top", 100)]


def test_the_sign_is_kept_in_colour_and_figures():
    html = strip([" warm", " cold"], [1.0, -2.0])
    assert colours(html) == [("p", 34), ("n top", 56)]
    assert "\u22122.00" in html
    assert '<span class="peak neg"' in html


def test_only_the_peak_is_bold_and_a_silent_row_has_none():
    assert strip([" a", " b", " c"], [1.0, 3.0, 2.0]).count(" top") == 1
    assert " top" not in strip([" a", " b"], [0.0, 0.0])


def test_hovering_gives_the_token_with_its_spaces_and_its_value():
    assert 'data-v="\u2423the  1.50"' in strip([" the"], [1.5])
    assert 'data-v="\u2423a  0"' in strip([" a", " b"], [0.0, 1.0])


@pytest.mark.parametrize(
    ("piece", "mark"),
    [
        ("\n", "\u21b5"),
        ("  ", "\u00b7\u00b7"),
        ("\t", "\u21e5"),
        (".\n\n", "\u21b5"),
        ("<|endoftext|>", "&lt;|endoftext|&gt;"),
    ],
)
def test_what_would_be_invisible_is_marked(piece: str, mark: str):
    assert f'<b class="ws">{mark}</b>' in strip([piece], [1.0])


def test_a_token_without_a_character_of_its_own_still_shows_its_value():
    html = strip([" \U0001f642", ""], [1.0, 2.0])
    assert 'class="p top part"' in html
    assert "2.00" in html


@pytest.mark.parametrize(
    "attack", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><i>', "</div>", "'x"]
)
def test_a_token_is_never_markup(attack: str):
    html = strip([attack, f" {attack}"], [1.0, 0.0])
    tags = re.sub(r'<(/?(div|span|i|b))( [a-z-]+="[^"<>]*")*>', "", html)
    assert "<" not in tags
    assert ">" not in tags


def test_characters_that_turn_text_round_are_made_visible():
    html = strip(["a\u202eb", "\x00", "\u200b"], [1.0, 1.0, 1.0])
    assert not {"\u202e", "\x00", "\u200b"} & set(html)
    assert "\u27e8202E\u27e9" in html


def test_around_the_peak_only_its_surroundings_are_shown_and_the_cuts_are_marked():
    pieces, acts = [f" w{i}" for i in range(20)], [0.0] * 20
    acts[10] = 1.0
    html = strip(pieces, acts, around=2)
    assert re.findall(r">(w\d+)<", html) == ["w8", "w9", "w10", "w11", "w12"]
    assert html.count('class="cut"') == 2
    acts[10], acts[0] = 0.0, 1.0
    assert strip(pieces, acts, around=2).count('class="cut"') == 1


def test_a_row_with_a_value_too_few_is_refused():
    with pytest.raises(ValueError, match="2 tokens but 1 values"):
        Row(pieces=["a", "b"], acts=[1.0], peak_index=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (4.0, "4.00"), (-0.0321, "\u22120.0321"), (126.4, "126"), (12345.6, "12,346"), (999.7, "1,000")],
)
def test_numbers_have_three_figures_and_a_true_minus(value: float, text: str):
    assert number(value) == text
