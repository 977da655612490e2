"""The report in headless Chromium: no request, films in sync, usable by keyboard and by all.

Two pages: one of a made-up run, whose content is known, and that of a quickstart, which
``QUICKSTART_REPORT`` names: CI makes one first. What else they need: ``helpers.browser``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import PATIENCE_SECONDS, axe_script, axe_violations, chromium, prefers
from helpers.report_case import NUM_FRAMES, write_generation, write_loss, write_run

from cosmos_posttrain.evaluation.config.report import ReportConfig
from cosmos_posttrain.evaluation.report import command

pytestmark = pytest.mark.browser

# Per clip: whether it plays, the times of its films, its slider, and what is written beside it.
STATE = """
return [...document.querySelectorAll(".clip")].map((clip) => ({
  playing: [...clip.querySelectorAll("video")].every((film) => !film.paused),
  ready: [...clip.querySelectorAll("video")].every((film) => film.readyState >= 3 && !film.seeking),
  times: [...clip.querySelectorAll("video")].map((film) => film.currentTime),
  value: Number(clip.querySelector("input").value),
  words: clip.querySelector("input").getAttribute("aria-valuetext"),
  output: clip.querySelector("output").textContent,
}));
"""
# The largest distance between films of a clip in so many pictures of the screen, and how far they
# came; measured in the page, because a command takes longer than a frame.
WATCH = """
const [seconds, done] = arguments;
const films = [...document.querySelector(".clip").querySelectorAll("video")];
const started = performance.now();
let largest = 0, last = films[0].currentTime, travelled = 0;
const look = () => {
  const times = films.map((film) => film.currentTime);
  const others = films.some((film) => film.seeking || film.ended);
  if (!others) largest = Math.max(largest, Math.max(...times) - Math.min(...times));
  if (times[0] > last) travelled += times[0] - last;
  last = times[0];
  if (performance.now() - started < 1000 * seconds) requestAnimationFrame(look);
  else done([largest, travelled]);
};
look();
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run, other = write_run(folder / "swap"), write_run(folder / "fresh", final_loss=4.6)
    write_loss(run / "evaluation" / "loss", run)
    write_loss(other / "evaluation" / "loss", other, nats=5.3)
    write_generation(run / "evaluation" / "generate", run)
    config = ReportConfig(run=[str(run), str(other)], output=str(folder / "report.html"))
    return command.run(config).resolve()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def browser(driver: Any, page: Path) -> Any:
    """The page of the made-up run, just opened, its films loaded."""
    return opened(driver, page)


@pytest.fixture(params=["made up", "quickstart"])
def any_page(request: pytest.FixtureRequest, page: Path) -> Path:
    if request.param == "made up":
        return page
    named = os.environ.get("QUICKSTART_REPORT")
    if named is None:
        pytest.skip("needs QUICKSTART_REPORT, the report.html of a quickstart")
    return Path(named).resolve()


@pytest.fixture
def any_browser(driver: Any, any_page: Path) -> Any:
    return opened(driver, any_page)


def opened(driver: Any, page: Path) -> Any:
    driver.get(page.as_uri())
    assert driver.execute_script(STATE)
    wait_for(lambda: all(clip["ready"] for clip in driver.execute_script(STATE)))
    return driver


def film_facts(browser: Any) -> tuple[float, int, int]:
    """Frames a second of the first clip, its frames, and how many of them were given."""
    clip = find(browser, ".clip")
    numbers = [clip.get_attribute(f"data-{name}") for name in ("fps", "frames", "given")]
    return float(numbers[0]), int(numbers[1]), int(numbers[2])


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def first(browser: Any) -> dict[str, Any]:
    return browser.execute_script(STATE)[0]


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def test_no_error_and_no_request(driver: Any, any_page: Path) -> None:
    import json

    driver.get_log("performance")
    driver.get_log("browser")
    driver.get(any_page.as_uri())
    find(driver, "#play-all").click()
    time.sleep(1)
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert addresses[0] == any_page.as_uri()
    assert [address for address in addresses[1:] if not address.startswith("data:")] == []
    # The policy in the page would stop one, and the console would tell.
    driver.execute_script("new Image().src = 'http://127.0.0.1:9/outside.png'")
    wait_for(lambda: "Content Security Policy" in str(driver.get_log("browser")))


def test_films_play_in_sync(any_browser: Any) -> None:
    browser = any_browser
    fps, num_frames, _ = film_facts(browser)
    assert first(browser)["output"] == f"1 / {num_frames}" and not first(browser)["playing"]
    find(browser, ".clip .play").click()
    wait_for(lambda: first(browser)["playing"])
    largest, travelled = browser.execute_async_script(WATCH, 3)
    assert travelled > 1  # seconds of film, in three seconds of time on a busy machine
    assert largest < 1.5 / fps  # a film is moved as soon as it is three quarters of a frame away
    find(browser, ".clip .play").click()
    wait_for(lambda: first(browser)["ready"])
    state = first(browser)
    assert not state["playing"] and len(set(state["times"])) == 1
    assert state["times"][0] == pytest.approx((state["value"] + 0.5) / fps, abs=1e-3)


def test_the_slider_works_by_keyboard(any_browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = any_browser
    fps, num_frames, num_given = film_facts(browser)
    assert num_frames == NUM_FRAMES and 3 < num_given < 16
    slider = find(browser, ".clip input[type=range]")
    for keys, frame, words in (
        ([Keys.ARROW_RIGHT] * 3, 3, "frame 4 of 17, given"),
        ([Keys.END], 16, "frame 17 of 17, generated"),
        ([Keys.ARROW_LEFT], 15, "frame 16 of 17, generated"),
        ([Keys.HOME], 0, "frame 1 of 17, given"),
    ):
        slider.send_keys(*keys)
        wait_for(lambda: first(browser)["ready"])
        state = first(browser)
        assert (state["value"], state["words"]) == (frame, words)
        assert state["output"] == f"{frame + 1} / {num_frames}"
        assert state["times"] == pytest.approx([(frame + 0.5) / fps] * 3, abs=1e-3)
    slider.send_keys(" ")
    wait_for(lambda: first(browser)["playing"])
    slider.send_keys(" ")
    wait_for(lambda: not first(browser)["playing"])


def test_what_is_shown_at_a_frame_is_that_frame(browser: Any) -> None:
    """The square of ``moving_square`` stands where it stands in the file."""
    where = """
    const film = [...document.querySelectorAll(".clip")].find(
      (clip) => clip.textContent.includes("calm")).querySelector("video");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [film.videoWidth, film.videoHeight];
    const context = canvas.getContext("2d");
    context.drawImage(film, 0, 0);
    const row = context.getImageData(0, 52, canvas.width, 1).data;
    for (let x = 0; x < canvas.width; x += 1) if (row[4 * x] > 200) return x;
    return -1;
    """
    slider = find(browser, ".clip:last-child input[type=range]")
    for frame in (1, 4, 9, 16):
        set_slider = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        )
        browser.execute_script(set_slider, slider, frame)
        wait_for(lambda: all(clip["ready"] for clip in browser.execute_script(STATE)))
        assert abs(browser.execute_script(where) - 8 * frame % (160 - 24)) <= 2


def test_tables_are_sorted(browser: Any) -> None:
    rows = """
    const table = document.querySelector("#loss table");
    return [...table.tBodies[0].rows].map((row) => row.cells[1].textContent.trim());
    """
    before = browser.execute_script(rows)
    head = find(browser, "#loss table th:nth-child(2) button")
    for order, reverse in (("descending", True), ("ascending", False)):
        head.send_keys("\n")
        assert find(browser, "#loss table th:nth-child(2)").get_attribute("aria-sort") == order
        assert browser.execute_script(rows) == sorted(before, key=float, reverse=reverse)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Any, scheme: str) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    expected = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}
    prefers(browser, scheme)
    browser.execute_script("try { localStorage.clear() } catch {}")
    browser.refresh()
    assert browser.execute_script(background) == expected[scheme]
    find(browser, "#theme").click()
    other = "dark" if scheme == "light" else "light"
    assert browser.execute_script(background) == expected[other]
    browser.execute_script("try { localStorage.clear() } catch {}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(any_browser: Any, scheme: str) -> None:
    script = axe_script()
    browser = any_browser
    prefers(browser, scheme)
    browser.execute_script(
        "for (const each of document.querySelectorAll('details')) each.open = true"
    )
    violations = axe_violations(browser, script)
    assert [found for found in violations if found[1] in ("serious", "critical")] == []


def test_paper_shows_everything(browser: Any) -> None:
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 10_000
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert (
        browser.execute_script("return document.querySelectorAll('details:not([open])').length")
        == 0
    )
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0
