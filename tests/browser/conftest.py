"""A real Chromium, a real TensorBoard on loopback, and runs with planted dead units."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.browser import planted

NAMES = ("stem.relu", "block1.relu", "block2.relu", "head.act")
SIZES = (24, 100, 300, 64)
WINDOWS = 30
START = 60  # seconds that TensorBoard may take on a busy machine


def chromium() -> str | None:
    """Where the system's Chromium is."""
    asked = os.environ.get("CHROMIUM")
    return asked or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str:
    """What is not there; empty where all is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright: pip install playwright"
    return "" if chromium() else "needs Chromium: apt-get install chromium"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = missing() if here else ""
    for item in here:
        item.add_marker(pytest.mark.browser)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@contextmanager
def tensorboard(log_dir: Path, *arguments: str) -> Iterator[str]:
    """The address of a TensorBoard that ends with the block."""
    # Where a port is taken between its choice and its use, TensorBoard says so and ends; port 0 has it choose itself.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port", "0", "--host", "localhost"]
    said = log_dir.parent / f"{log_dir.name}.log"
    with said.open("wb") as log, subprocess.Popen([*command, *arguments], stdout=log, stderr=log) as process:
        try:
            yield _address(said, process)
        finally:
            process.terminate()
            process.wait(START)


def _address(said: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"at (http://\S+)", said.read_text(errors="replace"))
        if found:
            address = found[1].rstrip("/")
            with urlopen(f"{address}/data/plugin/relu_doctor/runs"):  # it has begun to read
                return address
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not start:\n{said.read_text(errors='replace')}")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: ``sick``, and ``sound`` in which hardly a unit dies."""
    root = tmp_path_factory.mktemp("runs") / "logs"
    planted.write(root / "sick", planted.frames(NAMES, SIZES, WINDOWS))
    planted.write(root / "sound", planted.frames(NAMES, SIZES, WINDOWS, worst=0.02, seed=7))
    return root


@pytest.fixture(scope="session")
def board(runs: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows them."""
    with tensorboard(runs) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # No name but localhost leads anywhere.
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"
        started = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", rules])
        yield started
        started.close()


class Watched:
    """A page, and what it did that it should not.

    Attributes:
        page: Playwright's.
        asked: addresses of all requests.
        complaints: of our own files: console errors, and exceptions.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._console)
        self.refused: list[Any] = []
        page.on("response", lambda response: response.status >= 400 and self.refused.append(response))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _console(self, message: Any) -> None:
        where = message.location.get("url", "")
        ours = "relu_doctor" in where or where.startswith("file:") or "Content Security Policy" in message.text
        if message.type in {"error", "warning"} and ours:
            self.complaints.append(f"{message.type}: {message.text} ({where})")

    def open_tab(self, address: str) -> Any:
        """TensorBoard's tab; returns its frame once it is drawn."""
        self.page.goto(f"{address}/#relu_doctor")
        frame = self.page.locator("iframe").first.element_handle(timeout=30_000).content_frame()
        frame.wait_for_selector(".strip canvas, .message h2", timeout=30_000)
        return frame

    def open_file(self, path: Path) -> Any:
        """A page of its own."""
        self.page.goto(path.as_uri())
        if self.page.locator("noscript").count() == 0:
            self.page.wait_for_selector(".strip canvas", timeout=30_000)
        return self.page


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts further TensorBoards, which end with the test, after the pages that look at them."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(tensorboard(*arguments))


@pytest.fixture
def watched(browser: Any, serve: object) -> Iterator[Callable[..., Watched]]:
    """Opens pages; at the end none of them has complained, or asked for anything beyond this machine."""
    contexts = []
    pages: list[Watched] = []

    def open_page(**options: Any) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 720}, **options})
        contexts.append(context)
        pages.append(Watched(context.new_page()))
        return pages[-1]

    yield open_page
    for page in pages:
        page.complaints += [each.text() for each in page.refused if "relu_doctor" in each.url]
    for context in contexts:
        context.close()
    assert [complaint for page in pages for complaint in page.complaints] == []
    local = re.compile(r"^(https?://localhost:\d+/|file://|data:|blob:)")
    assert [url for page in pages for url in page.asked if not local.match(url)] == []
