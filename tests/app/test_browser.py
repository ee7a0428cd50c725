"""The workbench in a real browser: links, colours, values on hover, the keyboard, and no call to the network."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from activations.files import lock
from app.feature_file import features_html
from data.store import open_store
from tests.app.conftest import FULL, SIGNED
from tests.app.test_cli_app import free_port, sae_app
from tests.app.test_pareto import dictionary

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AFTER = "element => getComputedStyle(element, '::after').content"
WIDER = "(() => { const m = document.querySelector('.stMain'); return m.scrollWidth - m.clientWidth })()"
BACKGROUND = "element => getComputedStyle(element).backgroundColor"


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with sae_app(runs, port, tmp_path_factory.mktemp("cwd")) as process:
        assert process.stdout is not None
        assert f":{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def browser(address: str, tmp_path: Path):
    """browser(width, mode): a page with an empty profile; errors in it and calls elsewhere fail the test."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install Debian's chromium")
    faults: list[str] = []
    with sync_api.sync_playwright() as playwright:
        opened = []

        def show(width: int = 1280, mode: str = "light"):
            context = playwright.chromium.launch_persistent_context(
                tmp_path / f"profile{len(opened)}",
                executable_path=CHROMIUM,
                args=ARGS,
                color_scheme=mode,
                viewport={"width": width, "height": 900},
            )
            opened.append(context)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: faults.append(f"error in the page: {error}"))
            page.on("dialog", lambda dialog: (faults.append(f"a script ran: {dialog.message}"), dialog.dismiss()))
            page.on(
                "request", lambda r: r.url.startswith((address, "data:", "blob:")) or faults.append(f"call to {r.url}")
            )
            return page

        yield show
        for context in opened:
            context.close()
    assert faults == []


def test_a_shared_link_that_reaches_a_new_server_first_has_its_frame(browser, address: str):
    page = browser()
    page.goto(f"{address}/feature?run=demo&dictionary={FULL}&feature=1")
    page.wait_for_selector("h1.feature-title")
    assert page.inner_text("h1.feature-title") == "model words 1"
    assert page.evaluate("getComputedStyle(document.querySelector('.stApp')).getPropertyValue('--pos')") != ""


def test_from_the_overview_to_a_feature_and_its_values(browser, address: str):
    page = browser()
    page.goto(address)
    page.click(f"article.dict a.go:text-is('{FULL}')")
    page.wait_for_selector("a.go.row")
    assert f"dictionary={FULL}" in page.url
    page.fill("input[placeholder*='explanation']", "model words")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('a.go.row').length === 2")
    assert "search=model+words" in page.url
    page.click("a.go.row:has-text('model words 1')")
    page.wait_for_selector("h1.feature-title:text-is('model words 1')")
    assert page.url.startswith(f"{address}/feature?")
    assert "feature=1" in page.url
    token = page.locator(".strip i.top").first
    assert token.evaluate(AFTER) == "none"
    token.hover()
    shown = token.evaluate(AFTER)
    assert re.fullmatch(r'"\u2423\w+  [\d.]+"', shown), shown
    assert page.locator(".strip .peak").first.inner_text() in shown
    assert page.locator(".js-plotly-plot").count() == 2


def test_the_keyboard_goes_through_features_and_the_browser_goes_back(browser, address: str):
    page = browser()
    page.goto(f"{address}/feature?run=demo&dictionary={FULL}&feature=1")
    page.wait_for_selector("h1.feature-title:text-is('model words 1')")
    page.keyboard.press("j")
    page.wait_for_selector("h1.feature-title:text-is('model words 2')")
    assert "feature=2" in page.url
    page.keyboard.press("k")
    page.wait_for_selector("h1.feature-title:text-is('model words 1')")
    page.click("a.go.near >> nth=0")
    page.wait_for_function("!document.querySelector('h1.feature-title').textContent.includes('model words 1')")
    page.go_back()
    page.wait_for_selector("h1.feature-title:text-is('model words 1')")


def test_the_sign_has_a_colour_of_its_own_in_light_and_dark(browser, address: str):
    seen = {}
    for mode in ("light", "dark"):
        page = browser(mode=mode)
        page.goto(f"{address}/feature?run=demo&dictionary={SIGNED}&feature=1")
        page.wait_for_selector(".strip i.p.top")
        seen[mode] = [page.locator(f".strip i.{sign}.top").first.evaluate(BACKGROUND) for sign in "pn"]
        paper = page.locator(".stApp").evaluate(BACKGROUND)
        assert len({*seen[mode], paper}) == 3
    assert not set(seen["light"]) & set(seen["dark"])


@pytest.mark.parametrize("path", ["", "features", "feature", "steer", "training", "sweep"])
def test_at_400_pixels_nothing_runs_over_the_edge(browser, address: str, path: str):
    page = browser(width=400)
    page.goto(f"{address}/{path}?run=demo&dictionary={SIGNED}&feature=1")
    page.wait_for_selector(".stHtml h1, .stHtml .run")
    page.wait_for_timeout(1000)
    assert page.evaluate(WIDER) <= 0


def test_what_looks_like_markup_is_read_as_text(browser, address: str):
    page = browser()
    page.goto(f"{address}/feature?run=demo&dictionary={FULL}&feature=0")
    page.wait_for_selector("h1.feature-title")
    assert page.inner_text("h1.feature-title") == "about <b>rivers</b> & [mountains](http://example.com)"
    assert page.locator("h1.feature-title *").count() == 0


def test_a_feature_can_be_taken_away_as_one_file(browser, address: str, runs: Path):
    page = browser()
    page.goto(f"{address}/feature?run=demo&dictionary={FULL}&feature=1")
    page.wait_for_selector("h1.feature-title")
    with page.expect_download() as waiting:
        page.click(".st-key-html button")
    assert waiting.value.suggested_filename == "full-feature-1.html"
    with open_store(runs / "demo" / "dictionaries" / FULL) as store:
        assert Path(waiting.value.path()).read_text(encoding="utf-8") == features_html(store, [1])


def test_curves_grow_while_something_trains(browser, address: str, runs: Path):
    """The page looks again by itself, and stops when the training is over."""
    folder = runs / "young" / "dictionaries" / "going-on"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text('{"n_tokens": 100, "sizes": {"d_sae": 8}}')
    text = '{"step": 1, "tokens": 10, "fvu": 0.5, "l0": 3.0, "n_dead": 0, "lr": 0.001, "grad_norm": 1.0}\n'
    (folder / "train.jsonl").write_text(text)
    page = browser()
    try:
        with lock(folder / ".train.lock"):
            page.goto(f"{address}/training?run=young")
            page.wait_for_selector(".train .facts:has-text('training 10%')")
            (folder / "train.jsonl").write_text(text + text.replace("10,", "40,"))
            page.wait_for_selector(".train .facts:has-text('training 40%')")
        page.wait_for_selector(".train .facts:has-text('stopped')")
        assert page.locator(".js-plotly-plot").count() == 5
    finally:
        shutil.rmtree(folder.parent)


def test_the_metric_of_a_sweep_is_in_the_url_and_its_controls_come_into_the_plot(browser, address: str, runs: Path):
    for number, k in enumerate((2, 4)):
        found = {"fvu": 0.3, "l0": float(k), "truth.mcc": 0.9, "control.mean.fvu": 1.0}
        metrics = {name: {"value": value, "row": "planted"} for name, value in found.items()}
        dictionary(runs, f"swept{number}", metrics, k=k)
    page = browser(width=400)
    page.goto(f"{address}/sweep?run=run")
    page.wait_for_selector(".js-plotly-plot >> text=FVU (lower is better)")
    assert page.locator(".legendtext:has-text('control: mean')").count() == 0
    page.click("label:has-text('Axis reaches to all controls')")
    page.wait_for_selector(".legendtext:has-text('control: mean')")
    page.click("[data-testid=stSelectbox]:has-text('Metric')")
    page.keyboard.type("MCC")
    page.keyboard.press("Enter")
    page.wait_for_selector(".js-plotly-plot >> text=MCC (higher is better)")
    page.wait_for_url("**/sweep?run=run&metric=truth.mcc")
    page.reload()
    page.wait_for_selector(".js-plotly-plot >> text=MCC (higher is better)")
    assert page.evaluate(WIDER) <= 0
