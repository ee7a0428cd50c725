"""The file of features in a real browser, opened from the disk: nothing runs, nothing is fetched, it fits a phone."""

import socket
from pathlib import Path

import pytest

from app.feature_file import write_features
from tests.app.conftest import FULL, SIGNED
from tests.app.test_browser import ARGS, BACKGROUND, CHROMIUM
from tests.app.test_safety import ATTACKS
from tests.app.test_safety import hostile as hostile  # noqa: PLC0414  # a fixture

pytestmark = pytest.mark.slow
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def show():
    """show(file, width, mode): the open file; what it says on the console, asks for or fetches fails the test."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install Debian's chromium")
    faults: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)

        def opened(file: Path, width: int = 1280, mode: str = "light"):
            page = browser.new_page(color_scheme=mode, viewport={"width": width, "height": 900})
            page.on("console", lambda message: faults.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: faults.append(f"error in the page: {error}"))
            page.on("dialog", lambda dialog: (faults.append(f"a script ran: {dialog.message}"), dialog.dismiss()))
            page.on("request", lambda r: r.url in (file.as_uri(), "") or faults.append(f"call to {r.url}"))
            page.goto(file.as_uri())
            return page

        opened.faults = faults  # type: ignore[attr-defined]
        yield opened
        browser.close()
    assert faults == []


def test_it_opens_from_the_disk_in_light_and_dark_and_on_a_phone(show, runs: Path, tmp_path: Path):
    file = write_features(runs / "demo" / "dictionaries" / SIGNED, [1, 2, 3], tmp_path / "f.html")
    paper = {}
    for mode in ("light", "dark"):
        page = show(file, mode=mode)
        seen = [page.locator(f".strip i.{sign}.top").first.evaluate(BACKGROUND) for sign in "pn"]
        paper[mode] = page.locator("body").evaluate(BACKGROUND)
        assert len({*seen, paper[mode]}) == 3
        assert page.evaluate(WIDER) <= 0
        assert page.locator("svg.hist").count() == 6
        assert page.locator("svg.hist").first.bounding_box()["height"] > 100
    assert paper["light"] != paper["dark"]
    phone = show(file, width=400)
    assert phone.evaluate(WIDER) <= 0
    phone.click("nav a >> nth=2")
    assert phone.url == f"{file.as_uri()}#feature-3"
    assert abs(phone.locator("#feature-3").bounding_box()["y"]) < 900


def test_what_looks_like_markup_is_read_as_text(show, hostile: Path, tmp_path: Path):
    folder = hostile / "<b>run" / "dictionaries" / "d&<i>"
    page = show(write_features(folder, range(len(ATTACKS)), tmp_path / "f.html"))
    assert page.locator("h2").all_inner_texts() == ATTACKS
    assert page.locator("h2 *, script, img, iframe, svg:not(.hist)").count() == 0
    page.mouse.move(300, 300)


def test_text_that_got_past_the_escaping_could_do_nothing(show, runs: Path, tmp_path: Path):
    file = write_features(runs / "demo" / "dictionaries" / FULL, [1], tmp_path / "f.html")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        attack = f"<script>document.title = 'ran'</script><img src={there} onerror=\"document.title = 'ran'\">"
        file.write_text(file.read_text(encoding="utf-8").replace("<article", attack + "<article"), encoding="utf-8")
        page = show(file)
        page.wait_for_timeout(500)
        assert page.title() == "Feature 1 of demo/full"
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody called
    assert sum("Content Security Policy" in fault for fault in show.faults) >= 2
    show.faults.clear()
