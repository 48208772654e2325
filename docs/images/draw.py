"""Draw the pictures of README and docs: start the service, run real jobs, photograph its pages.

Run from a checkout after `make model`, with Debian's chromium installed: .venv/bin/python docs/images/draw.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.browser: a checkout's tests are not installed

from playwright.sync_api import Page

from jobs import Client
from jobs.local.service import down, start_detached
from jobs.settings import JobsSettings
from tests.browser import browser

IMAGES = Path(__file__).parent
WRITTEN = "[...document.querySelectorAll('.model-text')].filter(text => text.innerText.length > 200).length > 3"
PROMPTS = IMAGES.parents[1] / "examples" / "prompts.jsonl"


def main() -> None:
    """Draw all pictures."""
    with tempfile.TemporaryDirectory() as data_dir:
        settings = JobsSettings(data_dir=Path(data_dir), api_port=0)
        service = start_detached(settings)
        try:
            with Client(service.api_url) as client, browser() as chrome:
                page = chrome.new_page(base_url=service.api_url, viewport={"width": 1200, "height": 400})
                client.submit(PROMPTS, max_tokens=64, temperature=0).wait()
                rivers = [f"Tell me about {count} rivers." for count in range(2, 120)]
                long = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "max_concurrent": 6}
                client.submit(rivers, name="rivers", labels={"team": "maps"}, **long)
                lakes = client.submit(rivers[:40], name="lakes", labels={"team": "maps", "kind": "test"}, **long)
                page.goto("/")
                _draw(page, "jobs", seconds=9)
                page.set_viewport_size({"width": 1200, "height": 800})
                page.goto(f"/dashboard/jobs/{lakes.id}")
                page.wait_for_function(WRITTEN, timeout=300_000)
                _draw(page, "job", seconds=0)
        finally:
            down(settings.data_dir)


def _draw(page: Page, name: str, seconds: float) -> None:
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(seconds * 1000)  # until numbers of running jobs have settled
    page.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
