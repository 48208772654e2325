"""The pages in a real browser, on a real service with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect

from jobs.client import Client
from jobs.errors import InvalidKey
from jobs.local.service import LocalService, down, start_detached
from jobs.reports.report import make_report
from jobs.settings import JobsSettings, environment
from jobs.verification.signature import check_signature
from storage.webhooks import EVENT_TYPES
from tests.browser import browser, picture
from tests.models import save_tiny
from tests.receiver import a_receiver, status

PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)  # without it, five seconds
DIM = {"light": "rgb(93, 99, 109)", "dark": "rgb(166, 173, 184)"}  # of a report's side notes
UGLY = (
    "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\">"
    "\x1b[31mred\x1b[0m \u202eturned\u202c " + "x" * 100_000
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> JobsSettings:
    directory = save_tiny(tmp_path_factory.mktemp("models") / "tiny")
    data_dir = tmp_path_factory.mktemp("data")
    return JobsSettings(data_dir=data_dir, api_port=0, target=str(directory), webhook_networks="127.0.0.0/8")


@pytest.fixture(scope="module")
def service(settings: JobsSettings) -> Iterator[LocalService]:
    yield start_detached(settings)
    down(settings.data_dir)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture
def page(chrome: Browser, service: LocalService) -> Iterator[Page]:
    """A page that may load from this service only and must log no error."""
    context = chrome.new_context(base_url=service.api_url, viewport={"width": 1200, "height": 850})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []

    def note(request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss"):
            asked.append(parts.netloc)

    opened.on("request", note)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    assert set(asked) <= {urlsplit(service.api_url).netloc}
    assert complaints == []


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_a_job_is_submitted_followed_and_inspected(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    page.get_by_role("button", name="New job").click()
    page.get_by_label("Prompts, one per line").fill("abc abc abc abc\nxyz xyz xyz")
    page.get_by_label("Max tokens").fill("200")
    page.get_by_label("Record draft trees").click()
    page.get_by_role("button", name="Submit").click()

    expect(page.get_by_text("2 of 2 requests")).to_be_visible()
    open_tab(page, "Requests")
    expect(page.locator(".model-text").first).not_to_be_empty()
    picture(page, "requests")
    open_tab(page, "Trees")
    expect(page.get_by_text("sequences in the step").first).to_be_visible()
    picture(page, "tree")
    open_tab(page, "Statistics")
    expect(page.get_by_text("Speed-up over plain")).to_be_visible()
    expect(page.locator(".charts svg").first).to_be_visible()
    picture(page, "charts")


def test_tokens_arrive_and_a_job_is_cancelled(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc"] * 400, ignore_eos=True, temperature=0, cache=False)
    page.goto(f"/dashboard/jobs/{job.id}")

    expect(page.locator(".model-text").first).not_to_be_empty()
    texts = "[...document.querySelectorAll('.model-text')].map(text => text.innerText).join()"
    before = page.evaluate(texts)
    page.wait_for_function(f"before => {texts} != before", arg=before)
    picture(page, "live")
    page.get_by_role("button", name="Cancel job").click()
    expect(page.locator(".status").first).to_have_text("cancelled")


def test_lists_and_statistics_of_a_running_job_follow_it_to_its_end(page: Page, service: LocalService) -> None:
    """No element is clicked after the pages are open."""
    with Client(service.api_url) as client:
        job = client.submit(["abc"] * 400, ignore_eos=True, temperature=0, cache=False)
        page.goto(f"/dashboard/jobs/{job.id}")
        open_tab(page, "Requests")
        page.get_by_role("button", name="Running").click()
        expect(page.locator(".q-tab-panel .status-running").first).to_be_visible()
        numbers, everything, jobs = (page.context.new_page() for _ in range(3))
        numbers.goto(f"/dashboard/jobs/{job.id}")
        open_tab(numbers, "Statistics")
        everything.goto("/dashboard/stats")
        jobs.goto("/dashboard/")
        row = jobs.get_by_role("listitem").filter(has_text=job.id)
        expect(row.locator(".status")).to_have_text("in progress")
        for shown in (numbers, everything):
            figures = shown.locator("dl.figures").first
            expect(figures).to_contain_text("Tokens per second")
            before = figures.inner_text()
            expect(figures).not_to_have_text(before, use_inner_text=True)  # the list may be missing while replaced
        job.cancel()
    expect(row.locator(".status")).to_have_text("cancelled")
    expect(page.get_by_text("No requests.")).to_be_visible()
    expect(page.locator(".q-tab-panel .status-running")).to_have_count(0)
    told = httpx.get(f"{service.api_url}/v1/jobs/{job.id}/stats", timeout=240).json()
    expect(numbers.locator("dl.figures").first).to_contain_text(f"{told['steps']:,d} steps")


def test_the_page_shows_each_error_and_a_job_that_failed_completely_is_no_success(
    page: Page, service: LocalService
) -> None:
    wrong = [{"prompt": "a", "max_tokens": 0}, {"prompt": "a", "temperature": 9}, {"prompt": "a", "temperature": 9}]
    with Client(service.api_url) as client:
        job = client.submit(wrong)
        assert job.wait().status == "completed"
    page.goto(f"/dashboard/jobs/{job.id}")

    lines = page.locator("table.plain tbody tr")
    expect(lines).to_have_count(2)
    assert "temperature" in lines.nth(0).inner_text()
    assert "max_tokens" in lines.nth(1).inner_text()
    status = page.locator(".status").first
    expect(status).to_have_text("completed, all failed")
    expect(status).to_have_css("color", "rgb(138, 83, 0)")
    picture(page, "all-failed")


def test_prompts_that_are_too_long_for_the_form_are_refused_and_not_cut(page: Page) -> None:
    page.goto("/dashboard/")
    page.get_by_role("button", name="New job").click()
    page.get_by_label("Prompts, one per line").fill("é" * 2_000_000)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("too long for this form")


def test_hostile_text_is_shown_as_text_and_does_not_change_the_page(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit([UGLY, {"prompt": "a", "max_tokens": 0, "custom_id": "<b>bad</b>"}], max_tokens=4)
        job.wait()
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"/dashboard/jobs/{job.id}")

    expect(page.get_by_text("<script>document.title").first).to_be_visible()
    expect(page.get_by_text("<b>bad</b>").first).to_be_visible()
    assert "pwned" not in page.title()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, "ugly-phone")


@pytest.mark.parametrize("place", ["/dashboard/", "/dashboard/stats", "/dashboard/workers", "/dashboard/webhooks"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_pages_fit_phones_and_follow_the_system(
    page: Page, service: LocalService, place: str, width: int, scheme: str
) -> None:
    if place.endswith("stats"):
        with Client(service.api_url) as client:
            client.submit(["abc"], max_tokens=2).wait()
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 850})
    page.goto(place)

    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.wait_for_function(
        f"document.body.classList.contains('body--dark') === {'true' if scheme == 'dark' else 'false'}"
    )
    if place.endswith("stats"):
        expect(page.locator(".charts svg").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, f"{place.strip('/').replace('/', '-')}-{width}-{scheme}")


def test_ids_in_a_table_stay_whole_on_a_phone(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        client.submit(["abc"], max_tokens=2).wait()
    page.set_viewport_size({"width": 390, "height": 850})
    page.goto("/dashboard/stats")

    name = page.locator("table a").first
    expect(name).to_be_visible()
    place = name.bounding_box()
    assert place is not None
    assert place["height"] < 30  # one line of text
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_a_report_fits_phones_and_follows_the_system(
    page: Page, service: LocalService, width: int, scheme: str
) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc", {"prompt": "x" * 400_000, "custom_id": "y" * 64}], max_tokens=4)
        job.wait()
        html = make_report(job.info(), job.stats(), job.outputs())
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 850})
    page.set_content(html)

    expect(page.get_by_text("context_length_exceeded")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.querySelector('.dim')).color") == DIM[scheme]
    picture(page, f"report-{width}-{scheme}")


def test_the_keyboard_reaches_the_form(page: Page) -> None:
    page.goto("/dashboard/")
    expect(page.get_by_role("button", name="New job")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_role("button", name="New job").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompts, one per line")).to_be_focused()


def downloaded(page: Page) -> tuple[str, list[str]]:
    """Download the outputs of the job on the page; return the name and the lines of the file."""
    with page.expect_download() as started:
        page.get_by_role("link", name="Outputs").click()
    return started.value.suggested_filename, started.value.path().read_text().splitlines()


def test_the_outputs_of_a_job_are_saved_under_its_name(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc", "xyz"], max_tokens=4)
        job.wait()
    page.goto(f"/dashboard/jobs/{job.id}")

    name, lines = downloaded(page)

    assert name == f"{job.id}.jsonl"
    assert lines == httpx.get(f"{service.api_url}/v1/jobs/{job.id}/outputs", timeout=240).text.splitlines()


def submit_file(page: Page, path: Path) -> None:
    page.goto("/dashboard/")
    page.get_by_role("button", name="New job").click()
    page.locator("input[type=file]").set_input_files(str(path))
    page.get_by_label("Name (optional)").fill(path.stem)
    page.get_by_role("button", name="Submit").click()


def test_a_file_is_submitted_and_its_job_is_found_by_its_name_and_labels(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "rivers.jsonl"
    file.write_text("".join(json.dumps({"prompt": "abc", "max_tokens": 4}) + "\n" for _ in range(3)))
    submit_file(page, file)
    expect(page.get_by_role("heading", name="rivers")).to_be_visible()
    expect(page.get_by_text("3 of 3 requests")).to_be_visible()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Labels").fill("team=search")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("team=search")).to_be_visible()

    page.goto("/dashboard/")
    rows = page.get_by_role("listitem")
    page.get_by_label("Label", exact=True).fill("team=search")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("rivers")
    page.get_by_label("Search names").fill("lakes")
    expect(page.get_by_text("No job matches.")).to_be_visible()
    page.get_by_role("button", name="Show all jobs").click()
    expect(rows.first).to_be_visible()


def test_a_table_is_not_submitted_as_prompts(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "rivers.csv"
    file.write_text("river,length\nNile,6650\n")
    submit_file(page, file)
    expect(page.get_by_role("alert").filter(has_text="basic submit FILE --prompt-column")).to_be_visible()


def test_a_job_is_paused_and_resumed(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc"] * 400, ignore_eos=True, temperature=0, cache=False)
        page.goto(f"/dashboard/jobs/{job.id}")
        status = page.locator(".status").first
        page.get_by_role("button", name="Pause").click()
        expect(status).to_have_text("paused")
        page.get_by_role("button", name="Resume").click()
        expect(status).to_have_text("in progress")
        job.cancel()
    expect(status).to_have_text("cancelled")
    page.get_by_role("button", name="Retry failed requests").click()
    expect(page.get_by_role("button", name="Cancel job")).to_be_visible()
    assert job.id not in page.url
    page.get_by_role("button", name="Cancel job").click()


def test_a_job_is_verified_and_its_signed_report_saved(page: Page, service: LocalService, tmp_path: Path) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc", "xyz"], max_tokens=4)
        job.wait()
    page.goto(f"/dashboard/jobs/{job.id}")
    open_tab(page, "Verification")
    expect(page.get_by_text("No verification yet.")).to_be_visible()
    page.get_by_label("Sample").fill("none")
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_role("alert").filter(has_text="must be a share such as 1% or a number")).to_be_visible()
    page.get_by_label("Sample").fill("100%")
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_text("2 equal, 0 different, 0 not comparable")).to_be_visible()
    picture(page, "verification")
    with page.expect_download() as started:
        page.get_by_role("link", name="Signed report").click()
    report = json.loads(started.value.path().read_text())
    assert started.value.suggested_filename == f"{report['id']}.json"
    assert report["job"]["id"] == job.id
    assert check_signature(report)


def test_a_job_that_waits_after_its_pilot_shows_what_the_rest_takes(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit([f"abc {n}" for n in range(20)], pilot=4, max_tokens=8, ignore_eos=True, temperature=0)
        page.goto(f"/dashboard/jobs/{job.id}")
        figures = page.locator("dl.figures").first
        expect(figures).to_contain_text("Requests that wait16")
        expect(figures).to_contain_text("Completion tokens128")
        picture(page, "estimate")
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_text("20 of 20 requests")).to_be_visible()
        expect(page.get_by_text("Estimate of the rest")).to_be_hidden()


def test_a_deleted_job_is_gone_after_a_question_that_names_what_is_erased(page: Page, service: LocalService) -> None:
    with Client(service.api_url) as client:
        job = client.submit([f"abc {n}" for n in range(400)], ignore_eos=True, temperature=0, max_concurrent=1)
        page.goto(f"/dashboard/jobs/{job.id}")
        copy, title = page.get_by_role("button", name="Copy id"), page.get_by_role("heading", level=1)
        expect(copy).to_have_count(1)
        button, heading = copy.bounding_box(), title.bounding_box()
        assert button is not None
        assert heading is not None
        assert heading["y"] < button["y"] + button["height"] / 2 < heading["y"] + heading["height"], "on one line"
        watching = page.context.new_page()
        watching.goto(f"/dashboard/jobs/{job.id}")
        expect(watching.get_by_text("of 400 requests")).to_be_visible()
        page.get_by_role("button", name="Delete").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("400 prompts")
        expect(dialog).to_contain_text("It is cancelled first.")
        picture(page, "delete")
        dialog.get_by_role("button", name="Keep the job").click()
        expect(dialog).to_have_count(0)
        page.get_by_role("button", name="Delete").click()
        dialog.get_by_role("button", name="Cancel and delete").click()
        expect(page.get_by_role("button", name="New job")).to_be_visible()
        expect(watching.get_by_text("This job has been deleted.")).to_be_visible()
        assert job.id not in {left.id for left in client.jobs()}


def test_a_webhook_is_added_tested_and_a_failed_event_sent_again(page: Page, service: LocalService) -> None:
    page.goto("/dashboard/webhooks")
    expect(page.get_by_text("No webhook yet. Add one with New webhook")).to_be_visible()
    with a_receiver() as receiver, Client(service.api_url) as client:
        page.get_by_role("button", name="New webhook").click()
        page.get_by_label("URL").fill("ftp://example.com")
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.get_by_role("alert").filter(has_text="url")).to_be_visible()
        page.get_by_label("URL").fill(receiver.url)
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.get_by_text("whsec_")).to_be_visible()
        page.get_by_role("button", name="I have saved it").click()
        page.get_by_role("button", name="New secret").click()
        page.get_by_role("dialog").get_by_role("button", name="New secret").click()
        expect(page.get_by_text("whsec_")).to_be_visible()
        page.get_by_role("button", name="I have saved it").click()
        page.get_by_role("button", name="Send test").click()
        expect(page.get_by_text("The URL answered with status 200.")).to_be_visible()

        expect(page.get_by_text("No event has failed")).to_be_visible()
        receiver.answer = status(410)
        job = client.submit(["abc"], max_tokens=2)
        job.wait()
        failed = page.get_by_role("list", name="Events").get_by_role("listitem").filter(has_text=job.id[:18])
        expect(failed).to_contain_text("410")
        picture(page, "webhooks")
        receiver.answer = status(200)
        failed.get_by_role("button", name="Send again").click()
        expect(failed).to_have_count(0)
        page.get_by_role("button", name="Delivered").click()
        expect(failed).to_contain_text("200")
        assert len({headers["webhook-id"] for headers, _ in receiver.wait_for(3)[1:]}) == 1, "the same event, again"
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete webhook").click()
        expect(page.get_by_text("No webhook yet.")).to_be_visible()


def test_a_chat_writes_answers_and_says_why_one_is_refused(page: Page) -> None:
    page.goto("/dashboard/chat")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Message").fill("abc abc")
    page.keyboard.press("Enter")
    expect(page.get_by_text("40 tokens,")).to_be_visible()
    expect(page.locator(".chat .model-text").nth(1)).not_to_be_empty()
    page.get_by_label("Message").fill("abc " * 5_000)
    page.keyboard.press("Enter")
    expect(page.locator(".chat [role=status]").nth(1)).to_contain_text("context")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


PAGES = ("/", "/chat", "/keys", "/stats", "/workers", "/webhooks", "/login")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chrome: Browser, service: LocalService, scheme: Literal["light", "dark"]) -> None:
    with Client(service.api_url) as client:
        job = client.submit(["abc"], max_tokens=4, metadata={"name": "a job", "team": "search"})
        hook = {"url": "http://127.0.0.1:9/hook", "name": "a hook", "event_types": list(EVENT_TYPES)}
        made = client.run(lambda api: api.call("POST", "/v1/webhook_endpoints", json=hook))
        job.wait()
        verified = client.run(lambda api: api.verify(job.id, 1)).id
    context = chrome.new_context(base_url=service.api_url, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    job_page = f"/jobs/{job.id}"
    for path, tab in [(job_page, "Requests"), (job_page, "Verification"), *((path, None) for path in PAGES)]:
        page.goto(f"/dashboard{path}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        if tab is not None:
            open_tab(page, tab)
            expect(page.get_by_text(verified if tab == "Verification" else "1 of 1 requests")).to_be_visible()
        page.wait_for_load_state("networkidle")
        found = Axe().run(page).response["violations"]
        serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        assert serious == [], path
    context.close()
    with Client(service.api_url) as client:
        client.run(lambda api: api.call("DELETE", f"/v1/webhook_endpoints/{made['id']}"))


def keys_command(settings: JobsSettings, *arguments: str) -> str:
    command = [sys.executable, "-m", "jobs.cli", "keys", *arguments]
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=True).stdout


def log_in(page: Page, key: str) -> None:
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def expect_log_in(page: Page) -> None:
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    assert page.url.endswith("/dashboard/login")


def create_and_revoke_a_key(page: Page, service: LocalService) -> None:
    """As an administrator."""
    page.get_by_role("link", name="Keys").click()
    page.get_by_role("button", name="New key").click()
    page.get_by_label("Owner or purpose").fill("alice")
    page.get_by_role("button", name="Create").click()
    key = page.get_by_text("sk-basic-").inner_text()
    page.get_by_role("button", name="I have saved it").click()
    with Client(service.api_url, api_key=key) as client:
        assert client.jobs() == []
        page.get_by_role("listitem").filter(has_text="alice").get_by_role("button", name="Revoke").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(page.get_by_role("listitem").filter(has_text="alice")).to_contain_text("revoked")
        with pytest.raises(InvalidKey):
            client.jobs()


def test_once_there_is_a_key_the_pages_ask_for_it_and_a_revoked_one_closes_them(
    page: Page, service: LocalService, settings: JobsSettings
) -> None:
    """The last test: the service has a key from here on."""
    page.goto("/")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    made = keys_command(settings, "create", "looker", "--scope", "read", "--scope", "submit")
    key = next(word for word in made.split() if word.startswith("sk-basic-"))
    expect_log_in(page)  # without a reload: the page was open before there was a key

    page.goto("/")
    expect_log_in(page)
    page.get_by_label("Key").fill("sk-basic-wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("Invalid or expired key")
    log_in(page, key)
    assert all(cookie["httpOnly"] for cookie in page.context.cookies() if cookie["name"] == "basic_session")
    with Client(service.api_url, api_key=key) as client:
        job = client.submit(["abc"] * 400, ignore_eos=True, temperature=0, cache=False)
        places = ["/dashboard/", "/dashboard/stats", "/dashboard/workers", f"/dashboard/jobs/{job.id}"]
        pages = [page.context.new_page() for _ in places]
        for opened, place in zip(pages, places, strict=True):
            opened.goto(place)
            expect(opened.get_by_role("heading", level=1)).to_be_visible()
        expect(pages[-1].locator(".model-text").first).not_to_be_empty()
        name, _ = downloaded(pages[-1])
        assert name == f"{job.id}.jsonl"
        keys_command(settings, "revoke", "looker")
        for opened in pages:
            expect_log_in(opened)
        expect_log_in(page)
    admin = next(w for w in keys_command(settings, "create", "boss", "--scope", "admin").split() if "sk-basic-" in w)
    log_in(page, admin)
    create_and_revoke_a_key(page, service)
    page.get_by_role("button", name="Log out").click()
    expect_log_in(page)
    other = next(w for w in keys_command(settings, "create", "other", "--scope", "read").split() if "sk-basic-" in w)
    log_in(page, other)
    open_still = page.context.new_page()
    open_still.goto("/dashboard/webhooks")
    expect(open_still.get_by_text("A key with the scope submit may add one.")).to_be_visible()
    expect(open_still.get_by_role("button", name="New webhook")).to_have_count(0)
    open_still.goto("/dashboard/stats")
    expect(open_still.get_by_role("heading", level=1)).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect_log_in(page)
    expect_log_in(open_still)
    assert (
        httpx.get(f"{service.api_url}/dashboard/jobs/{job.id}/outputs", timeout=240).headers["location"]
        == "/dashboard/login"
    )


def test_the_page_says_that_only_this_host_may_be_asked(service: LocalService) -> None:
    reply = httpx.get(f"{service.api_url}/dashboard/login", timeout=240)
    assert "default-src 'self'" in reply.headers["content-security-policy"]
