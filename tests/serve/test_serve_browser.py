"""The page in headless Chromium: drop a clip, watch it appear, repeat it; by keyboard, by all."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import infer_case
from helpers.browser import axe_script, axe_violations, chromium, prefers
from helpers.service import Client, running, small_config, wait_until

from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import server

pytestmark = pytest.mark.browser

# A file that is dropped on the page, as a mouse would.
DROP = """
const [name, size, content, type] = arguments;
const bytes = content
  ? Uint8Array.from(atob(content), (c) => c.charCodeAt(0)) : new Uint8Array(size);
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type }));
const target = document.getElementById("drop");
for (const kind of ["dragenter", "dragover", "drop"]) {
  const options = { dataTransfer: data, bubbles: true, cancelable: true };
  target.dispatchEvent(new DragEvent(kind, options));
}
"""
# How many latent frames have pictures, whenever that changes, and whether the mp4 was there.
WATCH = """
window.seen = [];
setInterval(() => {
  const count = document.querySelectorAll("#strip img").length;
  const film = Boolean(document.getElementById("video").getAttribute("src"));
  const now = `${count} ${film}`;
  if (window.seen[window.seen.length - 1] !== now) window.seen.push(now);
}, 5);
"""
FILM = """
const film = document.getElementById("video");
return { ready: film.readyState, seconds: film.duration, width: film.videoWidth,
         time: film.currentTime, error: film.error && film.error.message };
"""


@pytest.fixture(scope="module")
def session() -> Session:
    return server.open_session(small_config())


@pytest.fixture
def client(tmp_path: Path, session: Session) -> Iterator[Client]:
    with running(small_config(max_batch_size=1), tmp_path / "service", session) as opened:
        yield opened


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(driver: Any, client: Client) -> Any:
    """The page, just opened, by somebody who has never been there."""
    driver.get(f"http://127.0.0.1:{client.port}/")
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.refresh()
    wait_until(lambda: "random:tiny" in text(driver, "facts"), "the model's name")
    driver.get_log("browser")
    return driver


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infer_case.write_input(tmp_path_factory.mktemp("inputs") / "bar.mp4")


def find(page: Any, name: str) -> Any:
    return page.find_element("id", name)


def text(page: Any, name: str) -> str:
    return str(find(page, name).text)


def drop(page: Any, path: Path, kind: str = "video/mp4") -> None:
    page.execute_script(DROP, path.name, 0, base64.b64encode(path.read_bytes()).decode(), kind)


def wait_for_status(page: Any, start: str) -> None:
    try:
        wait_until(lambda: text(page, "status").startswith(start), f"{start!r}")
    except AssertionError as error:
        raise AssertionError(f"{text(page, 'status')!r} is not {start!r}") from error


def test_a_dropped_clip_appears_and_becomes_an_mp4(page: Any, clip: Path) -> None:
    page.execute_script(WATCH)
    drop(page, clip)
    assert "bar.mp4 is ready" in text(page, "status")
    find(page, "seed").clear()
    find(page, "seed").send_keys("11")
    find(page, "generate").click()
    wait_for_status(page, "Done: 192 tokens")
    wait_until(lambda: page.execute_script(FILM)["ready"] >= 2, "the mp4")
    film = page.execute_script(FILM)
    assert film["error"] is None and film["width"] == 96
    assert film["seconds"] == pytest.approx(17 / 12, abs=0.1)
    wait_until(lambda: page.execute_script(FILM)["time"] > 0, "a moving picture")
    # Latent frames were seen before the mp4 was there.
    seen = page.execute_script("return window.seen")
    assert {"4 false", "5 false"} <= set(seen) and seen[-1] == "5 true"
    command = text(page, "command")
    assert "--seed 11" in command and "--input_image_or_video_path bar.mp4" in command
    find(page, "copy").click()
    wait_until(lambda: text(page, "copy") == "Copied", "the copy")
    assert page.get_log("browser") == []
    # The history outlives the page.
    page.refresh()
    entry = page.find_element("css selector", "#history button")
    assert "bar.mp4" in entry.text and "seed 11" in entry.text and "done" in entry.text
    entry.click()
    wait_for_status(page, "Done: 192 tokens")
    assert find(page, "seed").get_attribute("value") == "11"
    wait_until(lambda: page.execute_script(FILM)["ready"] >= 2, "the mp4 again")


def test_what_is_refused_says_why_while_a_clip_is_generated(
    page: Any, clip: Path, tmp_path: Path
) -> None:
    page.execute_script(DROP, "large.mp4", 200_000_000, "", "video/mp4")
    find(page, "generate").click()
    assert "large.mp4 has 200 MB, and at most 64 MB are let in" in text(page, "problem")
    drop(page, clip)
    find(page, "num_input_frames").send_keys("1")
    for _ in range(5):
        find(page, "generate").click()
    states = 'return [...document.querySelectorAll("#history button")].map((b) => b.innerText)'

    def num(state: str) -> int:
        return sum(entry.endswith(state) for entry in page.execute_script(states))

    wait_until(lambda: num("running") == 1, "the first of them")
    (tmp_path / "notes.txt").write_text("hello")
    drop(page, tmp_path / "notes.txt", "text/plain")
    find(page, "generate").click()
    wait_for_status(page, "Not done: notes.txt is not an image or a clip by its name")
    assert num("done") < 5
    wait_until(lambda: num("done") == 5, "five clips")
    errors = [entry for entry in page.get_log("browser") if "422" not in entry["message"]]
    assert errors == []


def test_it_can_be_used_by_keyboard(page: Any, clip: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    where = "return document.activeElement.id"
    reached = []
    for _ in range(9):
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.append(page.execute_script(where))
    wanted = ["theme", "file", "temperature", "top_p", "seed", "dice", "num_input_frames"]
    assert [name for name in reached if name in (*wanted, "generate")] == [*wanted, "generate"]
    find(page, "file").send_keys(str(clip))
    find(page, "generate").send_keys(Keys.ENTER)
    wait_for_status(page, "Done")
    entry = page.find_element("css selector", "#history button")
    entry.send_keys(Keys.ENTER)
    assert entry.get_attribute("aria-current") == "true"
    assert find(page, "status").get_attribute("role") == "status"


def test_a_clip_is_cancelled_on_the_page(page: Any, clip: Path) -> None:
    drop(page, clip)
    find(page, "num_input_frames").send_keys("1")
    find(page, "generate").click()
    wait_until(lambda: find(page, "cancel").is_enabled(), "the button")
    find(page, "cancel").click()
    wait_for_status(page, "Cancelled")


def test_the_page_asks_for_the_token(
    driver: Any, tmp_path: Path, session: Session, clip: Path
) -> None:
    config = small_config(auth_token="a-secret-word")
    with running(config, tmp_path / "service", session) as client:
        driver.get(f"http://127.0.0.1:{client.port}/")
        wait_until(lambda: find(driver, "token").is_displayed(), "the door")
        find(driver, "token").send_keys("another-word\n")
        wait_until(lambda: "not the right one" in text(driver, "door-problem"), "the sentence")
        find(driver, "token").clear()
        find(driver, "token").send_keys("a-secret-word\n")
        wait_until(lambda: "random:tiny" in text(driver, "facts"), "the model's name")
        drop(driver, clip)
        find(driver, "generate").click()
        wait_for_status(driver, "Done")
        wait_until(lambda: driver.execute_script(FILM)["ready"] >= 2, "the mp4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_and_axe(page: Any, clip: Path, scheme: str) -> None:
    prefers(page, scheme)
    background = "return getComputedStyle(document.body).backgroundColor"
    expected = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}
    assert page.execute_script(background) == expected[scheme]
    find(page, "theme").click()
    other = "dark" if scheme == "light" else "light"
    assert page.execute_script(background) == expected[other]
    find(page, "theme").click()
    script = axe_script()
    drop(page, clip)
    find(page, "generate").click()
    wait_for_status(page, "Done")
    assert axe_violations(page, script) == []
