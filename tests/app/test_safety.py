"""Nothing that a file, a token, a model or an address says becomes HTML, Markdown, a script or a path."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.parts.links import split_link
from app.parts.markup import href, link
from data.store import BuildOptions, Explanation, Score, build_store, open_store
from tests.app.conftest import FULL, html_of
from tests.planted import VOCAB, planted_codes, planted_decoder, planted_text

OpenPage = Callable[..., AppTest]
APP = Path(__file__).parents[2] / "app"
HTML_ATTACKS = [
    "<script>alert('x')</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)",
    "</style><svg onload=alert(1)>",
    "</div></section><iframe src=javascript:alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]
MARKDOWN_ATTACKS = [
    "# Heading",
    "[click](javascript:alert(1))",
    "![x](http://example.com/x.png)",
    "**bold** $x^2$ :red[x]",
]
ATTACKS = HTML_ATTACKS + MARKDOWN_ATTACKS
OURS = {
    "div",
    "span",
    "i",
    "b",
    "p",
    "a",
    "h1",
    "h2",
    "h3",
    "header",
    "section",
    "article",
    "details",
    "h4",
    "summary",
    "code",
    "table",
    "tr",
    "td",
    "mark",
    "tbody",
}
ATTRIBUTES = {"class", "style", "title", "href", "dir", "data-v", "data-k", "role", "aria-hidden", "aria-label"}


class Tags(HTMLParser):
    """Every tag and attribute that a browser would see, and the text between them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.styles: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]
        self.styles |= {value or "" for name, value in attrs if name == "style"}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(app: AppTest) -> str:
    """Raise unless everything shown is made of our own tags; return the text that a reader sees."""
    seen = Tags()
    seen.feed(html_of(app))
    assert seen.tags <= OURS
    assert seen.attributes <= ATTRIBUTES
    assert all(
        re.fullmatch(r"(overview|training|features|feature|steer)\?[\w.=&%+*~-]*", link) for link in seen.links
    ), seen.links
    assert all(re.fullmatch(r"((--a|left|width|height):[\d.]+%;?)*", style) for style in seen.styles)
    assert not app.markdown
    return "".join(seen.text)


@pytest.fixture(scope="module")
def hostile(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose every text is an attack: tokens, explanations, JSON files, names of folders and files."""
    root = tmp_path_factory.mktemp("hostile") / "runs"
    run = root / "<b>run"
    shutil.copytree(runs / "demo" / "dictionaries" / FULL, run / "dictionaries" / "d&<i>")
    folder = run / "dictionaries" / "d&<i>"
    (run / "run.json").write_text(
        json.dumps({"model": ATTACKS[0], "corpus": ATTACKS[1], "created": ATTACKS[2], "n_tokens": ATTACKS})
    )
    (folder / "eval.json").write_text(
        json.dumps({"metrics": {"fvu": {"value": 0.5, "definition": ATTACKS[2], "of": ATTACKS[4], "n": 1}}})
    )
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "architecture": ATTACKS[1]}))
    shutil.rmtree(folder / "explanations")
    shutil.rmtree(folder / "scores")
    rebuild(folder)
    with open_store(folder) as store:
        said = [
            Explanation.new(feature=i, text=text, source="person", explainer=text, model=text)
            for i, text in enumerate(ATTACKS)
        ]
        store.add_explanations(said)
        store.add_scores(
            [
                Score(
                    explanation_id=e.id,
                    feature=e.feature,
                    scorer=e.text,
                    value=0.5,
                    lo=-3.0,
                    hi=7.0,
                    n=1,
                    chance=0.5,
                    control=None,
                    failures=0,
                    cost_tokens=0,
                    created=e.created,
                    model=e.text,
                )
                for e in said
            ]
        )
    (run / "edits").mkdir()
    (run / "edits" / "<img src=x>.json").write_text("[]")
    return root


def rebuild(folder: Path) -> None:
    """The planted store once more, with attacks as the tokens that its features fire on."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = planted_text(80)
    vocab = list(VOCAB)
    for i, attack in enumerate(ATTACKS):
        vocab[1 + i] = f" {attack}".encode()
    pq.write_table(pa.table(text), folder / "t.parquet")
    pq.write_table(pa.table(planted_codes(text, 30, signed=True)), folder / "c.parquet")
    rows = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    build_store(
        folder / "features.duckdb",
        codes=[folder / "c.parquet"],
        tokens=[folder / "t.parquet"],
        n_features=30,
        vocab=vocab,
        meta={"signed": "true", "corpus": ATTACKS[0]},
        per_feature=planted_decoder(rows, signed=True),
        options=BuildOptions(memory="512MiB", threads=1),
    )


def test_the_checker_finds_markup_that_is_not_ours():
    for attack in HTML_ATTACKS[:2]:
        seen = Tags()
        seen.feed(attack)
        assert not seen.tags <= OURS


def test_an_overview_of_hostile_files_is_text(open_page: OpenPage, hostile: Path):
    text = check(open_page("overview", root=hostile))
    assert ATTACKS[0] in text
    assert ATTACKS[1] in text


@pytest.mark.parametrize("page", ["features", "steer"])
def test_hostile_labels_and_tokens_are_text(open_page: OpenPage, hostile: Path, page: str):
    text = check(open_page(page, root=hostile, run="<b>run", dictionary="d&<i>"))
    assert ATTACKS[0] in text


@pytest.mark.parametrize("feature", range(len(ATTACKS)))
def test_a_hostile_feature_is_text(open_page: OpenPage, hostile: Path, feature: int):
    text = check(open_page("feature", root=hostile, run="<b>run", dictionary="d&<i>", feature=str(feature)))
    assert text.startswith(ATTACKS[feature])
    assert text.count(ATTACKS[feature]) >= 3  # title, explanation, and the token it fires on


def test_hostile_text_of_ones_own_is_text(open_page: OpenPage):
    from tests.app.test_pages import try_text

    app = open_page("feature", run="demo", dictionary=FULL, feature="1")
    try_text(app, " ".join(ATTACKS))
    check(app)


@pytest.mark.parametrize("page", ["features", "feature", "steer"])
def test_an_address_with_an_attack_leads_nowhere_and_is_text(open_page: OpenPage, page: str):
    app = open_page(page, run="demo", dictionary=FULL)
    for attack in [*ATTACKS, "../..", "../../etc/passwd", "/etc", "demo/../demo", "demo\x00", ".", ""]:
        for run, dictionary in ((attack, FULL), ("demo", attack)):
            app.query_params["run"], app.query_params["dictionary"] = run, dictionary
            app.run()
            assert not app.exception
            check(app)
            assert "No such dictionary" in html_of(app)


@pytest.mark.parametrize("attack", [ATTACKS[0], ATTACKS[2], "../.."])
def test_choices_in_the_address_that_do_not_exist_are_passed_over(open_page: OpenPage, attack: str):
    names = {
        "features": ["search", "sort", "page", "score", "density", "alive", "source"],
        "feature": ["feature", "view"],
        "steer": ["feature", "unit", "strength", "prompt", "tokens", "seed"],
    }
    for page, keys in names.items():
        check(open_page(page, run="demo", dictionary=FULL, **dict.fromkeys(keys, attack)))


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.example/feature?run=x",
        "//evil.example/feature",
        "javascript:alert(1)",
        "/etc/passwd",
        "../feature",
        "",
        None,
        7,
        "feature" * 1000,
    ],
)
def test_a_clicked_address_that_is_not_ours_is_ignored(address: object):
    assert split_link(address) is None


def test_a_link_brings_back_exactly_what_went_in():
    query = {"run": 'a&b="<>', "dictionary": "x y/../%00", "feature": 7}
    import html

    address = html.unescape(href("feature", query))
    assert split_link(address) == ("feature", {k: str(v) for k, v in query.items()})
    seen = Tags()
    seen.feed(link("feature", query, "x"))
    assert seen.attributes == {"class", "href"}


MARKDOWN = {
    "markdown",
    "write",
    "title",
    "header",
    "subheader",
    "caption",
    "error",
    "warning",
    "info",
    "success",
    "toast",
    "badge",
    "metric",
    "exception",
    "latex",
    "help",
    "expander",
    "status",
    "popover",
    "tabs",
}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", sorted(APP.rglob("*.py")), ids=lambda p: str(p.relative_to(APP)))
def test_no_page_gives_changing_text_to_something_that_reads_markdown(path: Path):
    """Labels of widgets and Streamlit's own text elements interpret Markdown: they may only get constants."""
    for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr in MARKDOWN and isinstance(call.func.value, ast.Name) and call.func.value.id == "st":
            assert all(isinstance(arg, ast.Constant) for arg in call.args), f"{path.name}:{call.lineno}"
        if call.func.attr in ("html", "components") and any(k.arg == "unsafe_allow_javascript" for k in call.keywords):
            pytest.fail(f"{path.name}:{call.lineno} lets scripts in")
        assert not any(k.arg == "unsafe_allow_html" for k in call.keywords), f"{path.name}:{call.lineno}"
