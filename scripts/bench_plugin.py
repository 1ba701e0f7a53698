#!/usr/bin/env python
"""What the tab *ReLU Doctor* costs at a large run: TensorBoard's memory, and how long the tab waits for what it draws.

    python scripts/bench_plugin.py                    # 100,000 units, 500 windows; about 2 GB of memory, some minutes
    python scripts/bench_plugin.py --units 10000 --windows 100

With playwright and a Chromium it also measures the time per frame while the slider is moved at every frame.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the planted runs are the tests'

_START = 120  # seconds
_SCRUB = """async () => {
  const slider = document.querySelector("input.steps");
  const times = [];
  let before = await new Promise(requestAnimationFrame);
  for (let frame = 0; frame < 240; frame++) {
    slider.value = Math.round((1 + Math.sin(frame / 20)) / 2 * slider.max);
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    const now = await new Promise(requestAnimationFrame);
    times.push(now - before);
    before = now;
  }
  return times.slice(20);
}"""


def main() -> None:
    """Make the run, start TensorBoard, ask as the tab asks, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--windows", type=int, default=500)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="make the event files here, and use those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log_dir = arguments.keep or Path(folder) / "logs"
        if not list(log_dir.rglob("*tfevents*")):
            make(log_dir, arguments.units, arguments.windows, arguments.sites)
        size = sum(path.stat().st_size for path in log_dir.rglob("*tfevents*"))
        print(f"event files: {size / 1e6:,.1f} MB, {size / arguments.windows / arguments.units * 1000:,.0f} bytes per")
        print("  window and thousand units")
        measure(log_dir, arguments.windows)


def make(log_dir: Path, units: int, windows: int, sites: int) -> None:
    """An event file of one run, of sites of the same size."""
    from tests.browser import planted

    start = time.perf_counter()
    names = [f"blocks.{site}.mlp.act" for site in range(sites)]
    planted.write(log_dir / "run", planted.frames(names, [units // sites] * sites, windows))
    print(f"made {windows} windows of {units // sites * sites:,} units in {time.perf_counter() - start:.0f} s")


def measure(log_dir: Path, windows: int) -> None:
    """Start a TensorBoard on it, and ask."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port", "0", "--host", "localhost"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+b") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            address = wait_for_address(said.fileno(), process)
            base = f"{address}/data/plugin/relu_doctor"
            print(f"TensorBoard answers after {time.perf_counter() - start:.1f} s; {memory(process.pid)}")
            while not [run for run in json.loads(ask(f"{base}/runs")[0])["runs"] if run["windows"] >= windows]:
                time.sleep(0.5)
            print(f"all windows loaded after {time.perf_counter() - start:.1f} s; {memory(process.pid)}")
            name = json.loads(ask(f"{base}/runs")[0])["runs"][0]["run"]
            show("first timeline", *ask(f"{base}/timeline?run={name}"))
            show("timeline again", *ask(f"{base}/timeline?run={name}"))
            each = max(1, min(64, 2**21 // json.loads(ask(f"{base}/timeline?run={name}")[0])["num_units"]))
            starts = range(0, windows - each, each)
            chunks = [ask(f"{base}/status?run={name}&first={at}&last={at + each - 1}") for at in starts]
            took = statistics.median(seconds for *_, seconds in chunks)
            sent = statistics.median(size for _, size, _ in chunks)
            print(f"{'status chunk':16} {took * 1000:8.1f} ms {sent / 1000:10,.1f} kB sent, {each} windows (medians)")
            last = windows - 1
            show("findings", *ask(f"{base}/window?run={name}&window={last}"))
            show("a site's numbers", *ask(f"{base}/numbers?run={name}&window={last}&site=3"))
            show("causes of all", *ask(f"{base}/column?run={name}&window={last}&column=mechanism"))
            show("a unit's history", *ask(f"{base}/history?run={name}&site=3&unit=7"))
            print(f"afterwards: {memory(process.pid)}")
            scrub(address)
        finally:
            process.terminate()
            process.wait()


def ask(url: str) -> tuple[bytes, int, float]:
    """What came, how many bytes of it travelled, and after how many seconds."""
    start = time.perf_counter()
    with urlopen(Request(url, headers={"Accept-Encoding": "gzip"})) as answer:
        body = answer.read()
        took = time.perf_counter() - start
        packed = answer.headers.get("Content-Encoding") == "gzip"
    return gzip.decompress(body) if packed else body, len(body), took


def show(title: str, body: bytes, sent: int, seconds: float) -> None:
    """One line of the table."""
    print(f"{title:16} {seconds * 1000:8.1f} ms {sent / 1000:10,.1f} kB sent, {len(body) / 1000:,.1f} kB")


def wait_for_address(log: int, process: subprocess.Popen[bytes]) -> str:
    """What TensorBoard says that it answers at."""
    until = time.monotonic() + _START
    while time.monotonic() < until and process.poll() is None:
        text = Path(f"/proc/self/fd/{log}").read_bytes().decode("utf-8", "replace")
        found = re.search(r"at (http://\S+)", text)
        if found:
            return found[1].rstrip("/")
        time.sleep(0.05)
    raise SystemExit("TensorBoard did not start.")


def memory(process: int) -> str:
    """Resident memory of TensorBoard and of its data server."""
    found = {"TensorBoard": process}
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in path.read_text().split():
            found["data server"] = int(child)
    return ", ".join(f"{title} {resident(number):,.0f} MB" for title, number in found.items())


def resident(process: int) -> float:
    """Megabytes."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", text)
    return int(found[1]) / 1000 if found else 0


def scrub(address: str) -> None:
    """The time per frame while the slider moves, in a real browser where there is one."""
    try:
        from playwright.sync_api import sync_playwright

        from tests.browser.conftest import chromium
    except ImportError:
        print("no playwright: frames are not measured")
        return
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = started.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"{address}/#relu_doctor")
        start = time.perf_counter()
        frame = page.locator("iframe").first.element_handle(timeout=60_000).content_frame()
        assert frame is not None  # an iframe has one
        frame.wait_for_selector(".strip canvas", timeout=60_000)
        print(f"the tab is drawn {time.perf_counter() - start:.1f} s after it was opened")
        page.wait_for_timeout(15_000)  # all chunks are there
        times: Sequence[float] = frame.evaluate(_SCRUB)
        middle, worst = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(f"scrubbing: {middle:.1f} ms per frame (median), {worst:.1f} ms (95 % of them)")
        started.close()


if __name__ == "__main__":
    main()
