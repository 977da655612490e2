"""Chromium without a window, for tests of pages.

Skips where Chromium, its driver or selenium are missing. ``AXE_CORE_JS`` names axe-core's script,
which is looked for in ``node_modules`` otherwise; CI installs all of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed_run import REPOSITORY_DIR

PATIENCE_SECONDS = 60.0
_CHROMIUM, _DRIVER = "chromium", "chromedriver"


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver of the browser, without a window and without a way out; logs what pages do."""
    pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")
    missing = [name for name in (_CHROMIUM, _DRIVER) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(_CHROMIUM) or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1280,1000")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which(_DRIVER))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(PATIENCE_SECONDS)
    driver.set_page_load_timeout(2 * PATIENCE_SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


def prefers(driver: Any, scheme: str) -> None:
    """Makes the page believe that its reader prefers ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def axe_script() -> str:
    """axe-core, or a skipped test."""
    named = os.environ.get("AXE_CORE_JS")
    script = Path(named or REPOSITORY_DIR / "node_modules" / "axe-core" / "axe.min.js")
    if not script.is_file():
        pytest.skip("needs axe-core (npm install axe-core, or AXE_CORE_JS)")
    return script.read_text(encoding="utf-8")


def axe_violations(driver: Any, script: str) -> list[tuple[str, str, list[str]]]:
    """Rule, impact and some of the places of all that axe-core finds wrong in the page."""
    driver.execute_script(script)
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run().then(done, (error) => done(String(error)))"
    )
    assert isinstance(found, dict), found
    assert len(found["passes"]) > 20
    return [
        (rule["id"], rule["impact"], [node["html"][:200] for node in rule["nodes"]][:5])
        for rule in found["violations"]
    ]
