"""Chromium for tests: without a window, in a profile of its own, and with no way to any network."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest

from tests.servers import unavailable

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Whatever a page asks a network for fails, and is seen in the log.
    "--proxy-server=http://127.0.0.1:9",
)


class Browser:
    """A browser with one page: ``driver`` is selenium's, ``problems`` what the page was not to do."""

    def __init__(self, driver):
        self.driver = driver

    def visit(self, url):
        """Open the page from the beginning; returns when it says that it is ready."""
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, *arguments, seconds=30):
        """Wait until the script returns something that is true, and return that."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(
            lambda driver: driver.execute_script(script, *arguments)
        )

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def complaints(self):
        """What the console says since the page was opened: errors, warnings, what the policy forbade."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """The URLs that the page asked for since it was opened, data in the page itself aside."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
        return [url for url in asked if not url.startswith("data:")]


@contextmanager
def chromium_in(folder):
    """A browser that keeps its files in that folder, for as long as the block lasts."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        unavailable("chromium and chromedriver are not installed; Debian: chromium, chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        started = Chrome(options, Service(driver, log_output=str(folder / "driver.log")))
    except WebDriverException as exc:
        unavailable(f"chromium did not start: {exc.msg}")
    try:
        yield Browser(started)
    finally:
        started.quit()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A browser of this test session."""
    with chromium_in(tmp_path_factory.mktemp("chromium")) as found:
        yield found
