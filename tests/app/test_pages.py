"""Each page, as Streamlit runs it: on a full, a signed, an empty and a missing store, and with wrong addresses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.parts.strip import number
from data.store import QUANTILES, Store, open_store
from tests.app.conftest import BARE, EMPTY, FULL, N_FEATURES, SIGNED, html_of

OpenPage = Callable[..., AppTest]
FULL_URL = {"run": "demo", "dictionary": FULL}
SIGNED_URL = {"run": "demo", "dictionary": SIGNED}
PAGES = ["features", "feature", "steer", "training"]


# Overview


def test_overview_shows_figures_and_the_command_for_what_is_missing(open_page: OpenPage, runs: Path):
    html = html_of(open_page("overview"))
    assert f"sae index {runs}/demo/{BARE}" in html
    assert f"sae label {runs}/demo/{FULL}" in html
    assert f"sae collect {runs}/young" in html
    assert f'href="features?run=demo&amp;dictionary={FULL}"' in html
    assert 'class="v">63<' in html  # alive: nine in ten of the planted features
    assert ">0.214<" in html
    assert "error over variance. 95 % interval 0.200 to 0.230. n = 6,000 tokens." in html


@pytest.mark.parametrize("page", ["overview", *PAGES])
def test_without_runs_every_page_says_how_to_make_one(open_page: OpenPage, tmp_path: Path, page: str):
    assert "<code>sae demo</code>" in html_of(open_page(page, root=tmp_path / "none"))


@pytest.mark.parametrize("page", ["features", "feature", "steer"])  # training says what comes first: collect
def test_with_a_run_but_no_dictionary_every_page_says_train(open_page: OpenPage, tmp_path: Path, page: str):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    assert "sae train" in html_of(open_page(page, root=tmp_path))


def test_a_damaged_store_is_said_with_the_command_that_rebuilds_it(open_page: OpenPage, tmp_path: Path):
    folder = tmp_path / "r" / "dictionaries" / "d"
    folder.mkdir(parents=True)
    (tmp_path / "r" / "run.json").write_text("{}")
    (folder / "cfg.json").write_text("{}")
    (folder / "features.duckdb").write_bytes(b"no database")
    for page in ("overview", "features", "feature"):
        html = html_of(open_page(page, root=tmp_path))
        assert "cannot be read" in html
        assert "sae index" in html


# Features


def lines(app: AppTest) -> list[int]:
    """Feature numbers of the list, from its links."""
    return [int(n) for n in re.findall(r'class="go row[^"]*" href="feature\?[^"]*feature=(\d+)"', html_of(app))]


def test_the_list_shows_the_living_features_a_page_at_a_time(open_page: OpenPage):
    first = open_page("features", **FULL_URL)
    assert len(lines(first)) == 50
    second = open_page("features", **FULL_URL, page="2")
    assert len(lines(second)) == 63 - 50
    assert not set(lines(first)) & set(lines(second))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"search": "model words"}, [1, 2]),
        ({"search": "7"}, [7]),
        ({"search": "harbour"}, None),
        ({"source": "person"}, [0]),
        ({"score": "0.8"}, [1]),
        ({"search": "100%"}, []),
    ],
)
def test_search_and_filters_come_from_the_url(open_page: OpenPage, query: dict[str, str], expected: list[int] | None):
    app = open_page("features", **FULL_URL, **query)
    if expected is None:
        assert 0 < len(lines(app)) < 10  # the features that fire on that word
    else:
        assert sorted(lines(app)) == expected


def test_sorting_and_dead_features(open_page: OpenPage):
    app = open_page("features", **FULL_URL)
    app.selectbox(key="sort").select("number").run()
    assert lines(app) == list(range(50))
    app.toggle(key="alive").set_value(False).run()
    app.text_input(key="search").set_value(str(N_FEATURES - 1)).run()
    assert lines(app) == [N_FEATURES - 1]
    assert "never fires in the indexed text" in html_of(app)


def test_each_line_has_its_histogram_and_its_score(open_page: OpenPage):
    html = html_of(open_page("features", **FULL_URL, search="model words 1"))
    assert html.count('class="spark"') == 1
    assert html.count("<i ") > 10
    assert ">0.90<" in html


def test_a_signed_list_shows_both_ends(open_page: OpenPage):
    html = html_of(open_page("features", **SIGNED_URL))
    assert "\u22120." in html
    assert "<i class=n" in html


def test_nothing_found_is_said(open_page: OpenPage):
    assert "Nothing fits" in html_of(open_page("features", **FULL_URL, search="zzzz"))


@pytest.mark.parametrize("page", ["features", "feature"])
def test_a_store_without_features_is_said(open_page: OpenPage, page: str):
    html = html_of(open_page(page, run="demo", dictionary=EMPTY, feature="0"))
    assert "holds no features" in html
    assert "sae index" in html


@pytest.mark.parametrize("page", ["features", "feature"])
def test_a_missing_store_names_the_command(open_page: OpenPage, page: str):
    html = html_of(open_page(page, run="demo", dictionary=BARE))
    assert "No feature store yet" in html
    assert f"{BARE}</code>" in html


# Feature


def try_text(app: AppTest, text: str) -> None:
    app.text_area(key="own_text").set_value(text)
    next(b for b in app.button if b.label == "Test").click()
    app.run()
    assert not app.exception, app.exception[0].value


def test_the_best_explanation_leads_with_source_score_interval_chance_and_control(open_page: OpenPage):
    html = html_of(open_page("feature", **FULL_URL, feature="1"))
    assert '<h1 class="feature-title">model words 1</h1>' in html
    assert "lexical words 1" in html
    assert "detection 0.80\u20130.98, n = 40, chance 0.50, control 0.53, unreadable replies 2" in html


def test_the_page_shows_figures_charts_tables_and_neighbours(open_page: OpenPage):
    app = open_page("feature", **FULL_URL, feature="1")
    html = html_of(app)
    charts = app.get("plotly_chart")
    assert len(charts) == 2
    assert all("Histogram of" in str(chart.proto) for chart in charts)  # what stands for them in words
    assert "Raises most" in html
    assert "Lowers most" in html
    assert html.count('class="go near"') == 10
    assert ">harbour<" in html.replace(" harbour", "harbour") or "harbour" in html


def test_examples_come_as_top_intervals_and_random_with_the_true_peak(open_page: OpenPage):
    html = html_of(open_page("feature", **FULL_URL, feature="1"))
    headings = re.findall(r'<div class="group"><div class="section">([^<]+?) <', html)
    assert headings[0] == "Largest values"
    assert headings[-1] == "Random"
    assert [h.split()[0] for h in headings[1:-1]] == ["Values"] * 4
    lows = [float(h.split()[1]) for h in headings[1:-1]]
    assert lows == sorted(lows, reverse=True)
    largest = re.search(r'largest value</div><div class="v">([\d.]+)<', html)
    peaks = re.findall(r'class="peak pos"[^>]*>([\d.]+)<', html)
    assert largest is not None
    assert peaks[0] == largest[1]


def test_a_signed_feature_shows_both_poles(open_page: OpenPage):
    html = html_of(open_page("feature", **SIGNED_URL, feature="1"))
    assert "Largest values, positive pole" in html
    assert "Largest values, negative pole" in html
    assert 'class="peak neg"' in html
    assert 'class="n top"' in html
    assert "smallest value" in html
    assert "Fires on most, negative" in html


def test_a_dead_feature_says_so_and_still_shows_its_direction(open_page: OpenPage):
    app = open_page("feature", **FULL_URL, feature=str(N_FEATURES - 1))
    html = html_of(app)
    assert "This feature is dead" in html
    assert "Raises most" in html
    assert "near" in html
    assert len(app.get("plotly_chart")) == 1  # the logits; there are no values


def test_what_the_index_knows_is_shown_with_its_definitions(open_page: OpenPage, runs: Path):
    html = html_of(open_page("feature", **FULL_URL, feature="1"))
    with open_store(runs / "demo" / FULL) as store:
        profile = store.profile(1)
    assert profile is not None
    levels = re.findall(r'<span><span class="muted">(\d+) %</span> ([^<]+)</span>', html)
    assert levels == [(f"{100 * q:.0f}", number(v)) for q, v in zip(QUANTILES, profile.quantiles, strict=True)]
    bars = html[html.index('class="places"') : html.index('class="ends')]
    assert bars.count("<i ") == len(profile.positions) == 16
    assert 'role="img" aria-label="Share of tokens on which it fires, by position in the context: 0 to 7, ' in bars
    most = max(profile.positions, key=lambda each: each.n_active / max(each.n_tokens, 1))
    assert f"fires on {most.n_active:,} of {most.n_tokens:,} tokens" in bars
    assert bars.count("height:100%") >= 1
    assert "<b>+0.0123</b> \u00b1 0.00210 nats a token" in html
    assert "mean over 1,843 predicted tokens of 16 contexts in which it fires" in html
    assert "cluster 1<" in html
    assert "Strongest on" in html
    together = html[html.index("Fires together with") :]
    pairs = re.findall(r'feature=(\d+)"><span class="muted">\d+</span><span class="label">(.*?)</span>', together)
    assert [int(feature) for feature, _ in pairs] == [2, 3]
    assert pairs[0][1] == "model words 2"
    assert "both fire on 30 tokens; Jaccard 0.300, by chance 0.0200" in together
    assert re.findall(r'<span class="v">([\d.]+)</span></a>', together) == ["0.429", "0.214"]


def test_what_was_not_measured_names_the_command(open_page: OpenPage, runs: Path):
    html = html_of(open_page("feature", **FULL_URL, feature="2"))
    assert f"Not measured: <code>sae index {runs}/demo/{FULL} --features 2 --overwrite</code>" in html
    dead = html_of(open_page("feature", **FULL_URL, feature=str(N_FEATURES - 1)))
    assert "It fires at no position" in dead
    assert "there are no values" in dead
    assert "Fires together with" not in dead


def test_a_store_of_an_older_version_says_what_adds_the_rest(
    open_page: OpenPage, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Store, "profile", lambda _store, _number: None)
    html = html_of(open_page("feature", **FULL_URL, feature="41"))  # no other test remembers it
    assert f"<code>sae index {runs}/demo/{FULL} --overwrite</code> adds quantiles" in html
    assert "Neighbours" in html
    assert "Where in the context" not in html


def test_a_signed_feature_has_the_tokens_of_both_poles(open_page: OpenPage):
    html = html_of(open_page("feature", **SIGNED_URL, feature="1"))
    assert "Strongest on, positive" in html
    assert "Strongest on, negative" in html
    assert re.search(r'<span class="muted">1 %</span> \u2212', html)


@pytest.mark.parametrize("number", ["70", "-1", "x", "1e3", "\u0663", "999999999999999", "0; DROP TABLE features", ""])
def test_a_feature_that_does_not_exist_is_refused_in_words(open_page: OpenPage, number: str):
    html = html_of(open_page("feature", **FULL_URL, feature=number))
    assert "No such feature" in html
    assert "0 to 69" in html


def test_next_previous_random_and_jump_change_the_address(open_page: OpenPage):
    app = open_page("feature", **FULL_URL, feature="1")
    app.button(key="next").click().run()
    assert app.query_params["feature"] in ("2", ["2"])
    assert "model words 2" in html_of(app)
    app.button(key="previous").click().run()
    assert "model words 1" in html_of(app)
    app.number_input(key="jump_to").set_value(33).run()
    assert "<b>feature 33</b>" in html_of(app)
    app.button(key="random").click().run()
    assert not app.exception
    assert "This feature is dead" not in html_of(app)


def test_without_a_number_the_feature_looked_at_last_comes_back(open_page: OpenPage):
    app = open_page("feature", **FULL_URL, feature="5")
    del app.query_params["feature"]
    app.run()
    assert "<b>feature 5</b>" in html_of(app)


def test_only_the_peaks_surroundings_on_request(open_page: OpenPage):
    whole = html_of(open_page("feature", **FULL_URL, feature="1"))
    short = html_of(open_page("feature", **FULL_URL, feature="1", view="around peaks"))
    assert 'class="cut"' in short
    assert short.count("data-v=") < whole.count("data-v=") / 2


def test_ones_own_text_is_read_by_the_model_and_shown_on_top(open_page: OpenPage):
    app = open_page("feature", **FULL_URL, feature="1")
    try_text(app, "river harbour garden")
    html = html_of(app)
    assert "Your text" in html
    assert html.index("Your text") < html.index("Largest values")
    mine = html[html.index("Your text") : html.index("Largest values")]
    assert re.findall(r">(river|harbour|garden)<", mine) == ["river", "harbour", "garden"]
    app.button(key="next").click().run()
    assert "Your text" in html_of(app)  # it goes along to the next feature


def test_the_own_text_values_are_those_of_the_dictionary_on_the_models_activations(open_page: OpenPage, runs: Path):
    import torch

    from activations import load_model
    from activations.splice import read
    from app.parts.strip import number
    from sae import load_sae

    sae = load_sae(runs / "demo" / FULL)
    model = load_model(sae.model_name)
    ids = model.encode("<|endoftext|> river harbour garden")
    with read(model, [sae.hook]) as got:
        model(ids)
    z = sae.encode(got[sae.hook][0].float())
    assert ids.shape[1] == 4
    feature = int(torch.argmax(z[1:].max(dim=0).values))
    app = open_page("feature", **FULL_URL, feature=str(feature))
    try_text(app, "river harbour garden")
    html = html_of(app)
    mine = html[html.index("Your text") :]
    shown = re.findall(r'data-v="\u2423?(?:river|harbour|garden)  ([^"]+)"', mine)[:3]
    assert shown == [number(float(value)) for value in z[1:, feature]]


def test_a_model_that_is_not_there_is_said_in_one_line(open_page: OpenPage, runs: Path, tmp_path: Path):
    import json
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    config = tmp_path / "runs" / "demo" / "dictionaries" / FULL / "cfg.json"
    about = json.loads(config.read_text())
    about["metadata"]["model_name"] = str(tmp_path / "gone")
    config.write_text(json.dumps(about))
    app = open_page("feature", root=tmp_path / "runs", **FULL_URL, feature="1")
    try_text(app, "river")
    assert not app.exception
    assert "The text could not be read" in html_of(app)


# Steer


def press(app: AppTest) -> AppTest:
    next(b for b in app.button if b.label == "Write").click()
    app.run()
    assert not app.exception, app.exception[0].value
    return app


def test_the_link_of_a_feature_fills_in_the_steering_page(open_page: OpenPage):
    html = html_of(open_page("feature", **FULL_URL, feature="2"))
    assert f'href="steer?run=demo&amp;dictionary={FULL}&amp;feature=2"' in html
    app = open_page("steer", **FULL_URL, feature="2")
    assert app.number_input(key="feature").value == 2
    assert "model words 2" in html_of(app)


def test_base_and_steered_text_stand_side_by_side_and_differ(open_page: OpenPage):
    app = open_page("steer", **FULL_URL, feature="1", strength="10", unit="norm", prompt="river harbour", tokens="12")
    html = html_of(press(app))
    base, steered = re.findall(r'<div class="gen (?:base|steered)" dir="auto">(.*?)</div>', html)
    assert "river harbour" in base
    assert base != steered
    assert "<mark>" in steered
    kl = re.search(r'KL\(base, steered\)</div><div class="v">([\d.e+-]+) nats', html)
    assert kl is not None
    assert float(kl[1]) > 0


def test_strength_zero_changes_nothing(open_page: OpenPage):
    html = html_of(press(open_page("steer", **FULL_URL, feature="1", strength="0", prompt="river harbour", tokens="5")))
    base, steered = re.findall(r'<div class="gen (?:base|steered)" dir="auto">(.*?)</div>', html)
    assert base == steered
    assert "0.000" in html or ">0 nats" in html


def test_the_same_seed_gives_the_same_texts(open_page: OpenPage):
    query = {
        **FULL_URL,
        "feature": "1",
        "strength": "2",
        "prompt": "river",
        "temperature": "1",
        "seed": "7",
        "tokens": "8",
    }
    first, second = (html_of(press(open_page("steer", **query))) for _ in range(2))
    other = html_of(press(open_page("steer", **{**query, "seed": "8"})))
    texts = [re.findall(r'dir="auto">(.*?)</div>', html) for html in (first, second, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("query", "said"), [({"feature": str(N_FEATURES - 1)}, "never fired"), ({"prompt": " "}, "")])
def test_what_cannot_be_steered_is_said(open_page: OpenPage, query: dict[str, str], said: str):
    html = html_of(press(open_page("steer", **FULL_URL, **{"feature": "1", "prompt": "river", "tokens": "4", **query})))
    assert "Nothing was written" in html
    assert said in html


def test_a_saved_vector_can_be_chosen(open_page: OpenPage, runs: Path, tmp_path: Path):
    import shutil

    from sae import load_sae
    from steering import SteeringVector

    shutil.copytree(runs, tmp_path / "runs")
    vector = SteeringVector.from_latent(load_sae(runs / "demo" / FULL), 1)
    edits = tmp_path / "runs" / "demo" / "edits"
    edits.mkdir()
    vector.save(edits / "rivers.safetensors")
    app = open_page("steer", root=tmp_path / "runs", **FULL_URL, prompt="river", tokens="4", strength="3")
    next(b for b in app.button_group if b.label == "What to add").set_value("A saved edit").run()
    html = html_of(press(app))
    assert "rivers.safetensors, strength 3.00" in html
