"""Features as one HTML file: whole, small, inert whatever is in it, and the same as the page's."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from streamlit.testing.v1 import AppTest

from activations.errors import InputError
from app.cli import main
from app.feature_file import features_html, write_features
from app.parts.histogram import decades, histogram_svg, ticks
from data.store import Store, StoreError, open_store
from data.store.schema import Coactive, LossEffect, PositionBin, Profile
from tests.app.conftest import FULL, SIGNED
from tests.app.test_safety import ATTACKS
from tests.app.test_safety import hostile as hostile  # noqa: PLC0414  # a fixture

VOID = {"meta", "link", "path"}
INERT = {"html", "head", "meta", "title", "link", "style", "body", "header", "nav", "article", "aside", "footer"} | {
    *("h1", "h2", "p", "div", "span", "a", "b", "i", "code", "table", "tr", "td"),
    *("svg", "path", "rect", "text"),
}
KNOWN = {"lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "id", "title", "style", "dir"} | {
    *("aria-label", "aria-hidden", "role", "viewbox", "d", "x", "y", "width", "height", "text-anchor"),
}


class Document(HTMLParser):
    """A document as a browser reads it: elements with their attributes, text by the element around it."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def seen(self) -> str:
        return "".join(text for around, text in self.text if around not in ("style", "title"))


def inert(source: str) -> Document:
    """Raise unless the document is whole and can neither run nor load anything."""
    document = Document(source)
    assert document.open == []
    assert {tag for tag, _ in document.elements} <= INERT
    assert {name for _, attributes in document.elements for name in attributes} <= KNOWN
    assert len(document.of("style")) == 1
    links = [a["href"] for _, a in document.elements if "href" in a]
    assert all(re.fullmatch(r"#feature-\d+|data:image/svg\+xml,[\w%/.~-]+", link) for link in links), links
    assert all(
        re.fullmatch(r"((--a|left|width|height):[\d.]+%;?)+", a["style"]) for _, a in document.elements if "style" in a
    )
    (policy,) = [m["content"] for m in document.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    css = "".join(text for around, text in document.text if around == "style")
    assert not re.search(r"url\(|@import|expression\(", css)
    return document


def sae(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def full(runs: Path) -> Path:
    return runs / "demo" / "dictionaries" / FULL


@pytest.fixture(scope="module")
def signed(runs: Path) -> Path:
    return runs / "demo" / "dictionaries" / SIGNED


def document(folder: Path, *features: int) -> Document:
    with open_store(folder) as store:
        return inert(features_html(store, features))


# What is in it


def test_a_feature_has_what_the_store_knows_of_it(full: Path):
    page = document(full, 1)
    seen = page.seen()
    assert ("title", "Feature 1 of demo/full") in page.text
    assert ("h2", "model words 1") in page.text
    for said in ("planted", "blocks.0.hook_resid_post", "lexical words 1", "0.80\u20130.98", "control 0.53"):
        assert said in seen, said
    for heading in ("Values", "Effect on logits", "Raises most", "Lowers most", "Largest values ", "Random "):
        assert ("div", heading) in page.text, heading
    for heading in ("Other explanations", "Fires on most", "Neighbours "):
        assert ("div", heading) in page.text, heading
    assert page.of("nav") == []
    with open_store(full) as store:
        feature, profile = store.feature(1), store.profile(1)
        assert profile is not None
        assert f"{feature.n_active:,}" in seen
        assert f"{feature.max:.2f}" in seen
        drawn = [text for around, text in page.text if around == "title" and text.endswith(" tokens")]
        counts = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in drawn]
        assert counts == [n for n in feature.hist_counts if n]
        assert [e.token_ids for e in store.examples(1) if e.kind == "random"]


def test_a_token_tells_its_value_and_the_peak_is_marked(full: Path):
    page = document(full, 1)
    tops = [i for i in page.of("i") if "top" in i.get("class", "").split()]
    with open_store(full) as store:
        shown = [e for e in store.examples(1) if e.kind != "quantile" and (e.kind != "top" or e.rank < 12)]
        best = max(e.peak for e in shown)
    assert len(tops) == len(shown)
    assert tops[0]["title"] == f"\u2423mountain  {best:.2f}"
    assert all("title" in i for i in page.of("i") if "class" in i)
    assert "\u21b5" in page.seen()  # a line break is a mark


def test_both_signs_look_different_without_colour(signed: Path):
    page = document(signed, 1)
    styles = [set(i["class"].split()) for i in page.of("i") if "class" in i]
    assert any("p" in style for style in styles)
    assert any("n" in style for style in styles)
    assert any("  \u2212" in i["title"] for i in page.of("i") if "title" in i)
    assert {rect.get("class", "") for rect in page.of("rect")} == {"", "n"}
    css = next(text for around, text in page.text if around == "style")
    assert "underline" in re.search(r"\.tokens i\.n \{[^}]*\}", css)[0]
    for words in ("Largest values, positive pole ", "Largest values, negative pole ", "Fires on most, negative"):
        assert ("div", words) in page.text


def test_several_have_contents_and_lead_to_each_other_and_nowhere_else(full: Path):
    with open_store(full) as store:
        near = store.feature(1).neighbours[0].feature
    page = document(full, 1, near, 69)
    ids = [a["id"] for a in page.of("article")]
    assert ids == ["feature-1", f"feature-{near}", "feature-69"]
    links = [a["href"] for a in page.of("a")]
    assert links[:3] == [f"#{each}" for each in ids]
    assert {link[1:] for link in links} == set(ids)
    assert f"#feature-{near}" in links[3:]
    assert ("h1", "3 features of demo/full") in page.text


def test_a_feature_that_never_fired_says_so(full: Path):
    seen = document(full, 69).seen()
    assert "Never fires in the indexed text" in seen
    assert "so there are no examples" in seen


def test_the_same_store_gives_the_same_bytes_and_no_path_of_this_machine(full: Path, tmp_path: Path):
    one = write_features(full, [2, 1, 2], tmp_path / "one.html").read_bytes()
    with open_store(full) as store:
        assert features_html(store, [2, 1]).encode() == one
    assert b"/tmp" not in one
    assert str(full.parent).encode() not in one
    elsewhere = shutil.copytree(full, tmp_path / "demo" / "dictionaries" / FULL)
    assert write_features(elsewhere, [2, 1], tmp_path / "two.html").read_bytes() == one


def test_what_the_profile_says_is_there_and_links_lead_inside_the_file(full: Path, monkeypatch: pytest.MonkeyPatch):
    met = [Coactive(feature=n, n=1000 * n, jaccard=0.1 * n, chance=0.04, phi=0.2 * n) for n in (1, 2, 3)]
    loss = LossEffect(nats=0.012, error=0.003, control=0.001, n_contexts=16, n_tokens=2000)
    profile = Profile(
        quantiles=[float(i) for i in range(1, 10)],
        strong_tokens=[],
        weak_tokens=[],
        positions=[PositionBin(first=0, last=63, n_tokens=640, n_active=64, mean=2.0)],
        by_jaccard=[met[2], met[0]],
        by_phi=[met[2], met[1]],
        x=None,
        y=None,
        cluster=None,
        loss=loss,
    )
    monkeypatch.setattr(Store, "profile", lambda _store, _feature: profile)
    page = document(full, 1, 2)
    seen = page.seen()
    for said in ("10 % 3.00", "99 % 9.00", "+0.0120 \u00b1 0.00300 nats a token", "most: 10 %"):
        assert said in seen, said
    assert ("div", "Fires together with ") in page.text
    linked = [a["href"] for a in page.of("a") if a.get("class") == "near with"]
    assert linked == ["#feature-2", "#feature-1"] * 2
    assert len([d for d in page.of("div") if d.get("class") == "near with"]) == 2  # feature 3 is not in the file


@pytest.mark.parametrize(("name", "most"), [(FULL, 70_000), (SIGNED, 95_000)])
def test_it_is_small(runs: Path, name: str, most: int):
    """Bytes that a feature adds: the signed one has the windows of both poles. Style, head and end are 20 kB a file."""
    with open_store(runs / "demo" / "dictionaries" / name) as store:
        one, many = (len(features_html(store, range(1, 1 + n)).encode()) for n in (1, 11))
    assert (many - one) / 10 < most
    assert one < most + 20_000


# Whatever is in it


@pytest.mark.parametrize("feature", range(len(ATTACKS)))
def test_hostile_labels_and_tokens_are_text(hostile: Path, feature: int):
    page = document(hostile / "<b>run" / "dictionaries" / "d&<i>", feature)
    assert ("h2", ATTACKS[feature]) in page.text
    assert page.seen().count(ATTACKS[feature]) >= 2  # and the token that it fires on
    assert ("title", f"Feature {feature} of <b>run/d&<i>") in page.text


def test_contents_of_hostile_labels_are_text(hostile: Path):
    page = document(hostile / "<b>run" / "dictionaries" / "d&<i>", *range(len(ATTACKS)))
    assert [text for around, text in page.text if around == "span" and text in ATTACKS][: len(ATTACKS)] == ATTACKS


@pytest.mark.parametrize("part", ["app.feature_file", "app.parts.cards", "app.parts.strip", "app.parts.score"])
def test_the_checker_finds_what_is_not_escaped(hostile: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    monkeypatch.setattr(f"{part}.esc", str)
    with pytest.raises(AssertionError):
        document(hostile / "<b>run" / "dictionaries" / "d&<i>", *range(len(ATTACKS)))


# The command


def test_the_command_writes_one_file(full: Path, tmp_path: Path):
    out = tmp_path / "new" / "features.html"
    done = sae("export", full, out, "--format", "html", "--features", "3,7,12", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"written": str(out)}
    assert [p.name for p in out.parent.iterdir()] == ["features.html"]
    assert [a["id"] for a in inert(out.read_text(encoding="utf-8")).of("article")] == [
        "feature-3",
        "feature-7",
        "feature-12",
    ]
    told = sae("export", full, tmp_path / "f.html", "--format", "html", "--features", "3")
    assert told.output == f"1 feature of {full} in {tmp_path / 'f.html'}: open it in a browser.\n"


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(full: Path, tmp_path: Path):
    out = tmp_path / "f.html"
    with pytest.raises(StoreError, match="there is no feature 70: expected 0 to 69"):
        write_features(full, [3, 70, 5], out)
    with pytest.raises(StoreError, match="there is no feature -1"):
        write_features(full, [-1], out)
    with pytest.raises(InputError, match="No features were named"):
        write_features(full, [], out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_features(full, [3], out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("words", [["--format", "html"], ["--format", "saelens", "--features", "3"]])
def test_features_belong_to_html_and_html_to_features(full: Path, tmp_path: Path, words: list[str]):
    done = sae("export", full, tmp_path / "x", *words)
    assert done.exit_code == 2
    assert "--format html needs --features" in done.output
    assert not (tmp_path / "x").exists()


# The page


def test_the_feature_page_offers_it(open_page: Callable[..., AppTest]):
    app = open_page("feature", run="demo", dictionary=FULL, feature="1")
    (button,) = app.get("download_button")
    assert button.proto.label == "HTML"


# The histogram


def test_a_bar_stands_on_its_bin_and_has_its_sign():
    svg = Document(histogram_svg([-2.0, -1.0, 0.0, 1.0, 2.0], [3, 1, 0, 100], of="tokens", axis="v", alt="a", log=True))
    bars = svg.of("rect")
    assert [bar.get("class") for bar in bars] == ["n", "n", None]
    left, width = (float(bars[0]["x"]), float(bars[2]["x"])), [float(bar["width"]) for bar in bars]
    assert left == (46.0, 229.0)
    assert width == [56.1, 56.1, 56.1]
    assert 0 < float(bars[1]["height"]) < float(bars[0]["height"]) < float(bars[2]["height"])
    assert [text for around, text in svg.text if around == "title"][-1] == "1.00 to 2.00: 100 tokens"


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 31.9, 4) == [0.0, 10.0, 20.0, 30.0]
    assert ticks(-0.84, 1.04, 4) == [-0.5, 0.0, 0.5, 1.0]
    assert ticks(0.00001, 0.00005, 4) == [1e-05, 2e-05, 3e-05, 4e-05, 5e-05]
    assert ticks(2.0, 2.0, 4) == [2.0]
    assert decades(1) == [1]
    assert decades(5000) == [1, 10, 100, 1000]
    assert decades(10**9) == [1, 100, 10**4, 10**6, 10**8]
