"""Figures are built from the numbers given, keep the sign, and have a sentence that stands for them."""

import math

from app import figures
from app.theme import NEGATIVE_BAR, POSITIVE_BAR

EDGES, COUNTS = [-2.0, -1.0, 0.0, 1.0, 2.0], [3, 1, 0, 100]


def test_a_bar_stands_on_its_bin_and_has_the_colour_of_its_sign():
    bars = figures.activation_histogram(EDGES, COUNTS).data[0]
    assert list(bars.x) == [-1.5, -0.5, 0.5, 1.5]
    assert list(bars.width) == [1.0] * 4
    assert list(bars.y) == COUNTS
    assert list(bars.marker.color) == [NEGATIVE_BAR.light] * 2 + [POSITIVE_BAR.light] * 2


def test_counts_of_values_are_on_a_log_axis_that_shows_a_single_one_and_the_largest():
    axis = figures.activation_histogram(EDGES, COUNTS).layout.yaxis
    assert axis.type == "log"
    assert axis.range[0] < math.log10(1) < math.log10(100) < axis.range[1]


def test_logit_counts_are_on_a_plain_axis():
    assert figures.logit_histogram(EDGES, COUNTS).layout.yaxis.type != "log"


def test_the_sentence_names_the_range_and_the_fullest_bin():
    said = figures.histogram_alt("values", EDGES, COUNTS)
    assert "104 in 4 bins from -2 to 2" in said
    assert "1 to 2, holds 100" in said
    assert figures.histogram_alt("values", [], []) == "Histogram of values: empty."
