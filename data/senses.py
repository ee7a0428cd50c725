"""Words of several senses in sentences: what the metric of polysemous words reads. 28 words, two senses each, twice.

Written for this package; see samples/SOURCES.md.
"""

import csv
from pathlib import Path

PATH = Path(__file__).parent / "samples" / "senses.csv"


def sense_contexts(path: Path = PATH) -> list[tuple[str, str, str]]:
    """(word, sense, sentence with the word) of each row; any CSV with these three columns can be read."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["word"], row["sense"], row["context"]) for row in csv.DictReader(file)]
