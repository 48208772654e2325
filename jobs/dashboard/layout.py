"""Layout of all pages: colours, styles, header and navigation.

All assets come from this host, and the content security policy forbids the browser to load from others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nicegui import ui

from jobs.dashboard.session import BASE, PageContext

DRAFT, TARGET, GREY = "#1f9d63", "#9065d8", "#7d848e"  # accepted draft tokens; the target's own tokens; the rest

# unsafe-eval: Vue compiles templates in the browser.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws: wss:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'"
)

_PAGES: Final = (
    ("Jobs", "/"),
    ("Chat", "/chat"),
    ("Statistics", "/stats"),
    ("Workers", "/workers"),
    ("Webhooks", "/webhooks"),
)
_STYLES: Final = Path(__file__).with_name("style.css")


@contextmanager
def frame(title: str, context: PageContext | None = None) -> Iterator[None]:
    """Put the elements of the block below the header. Without a context there is no navigation."""
    ui.page_title(f"{title} · bASIC")
    ui.add_css(_STYLES)
    ui.colors(primary="#6b44b8", positive="#0d6b41", negative="#b3261e")
    mode = ui.dark_mode(None if context is None else context.dark)
    with (
        ui.header()
        .classes("items-center")
        .style("background:#2b2140;padding:.4rem 1rem;gap:1rem;flex-wrap:wrap;align-items:center")
    ):
        with link("#main").classes("skip"):  # inside the header, to be the first element of the page
            ui.label("Skip to content")
        with link(f"{BASE}/").classes("text-white").style("text-decoration:none;font-weight:700"):
            ui.label("bASIC")
        if context is not None:
            with ui.element("nav").props('aria-label="Pages"').classes("line grow"):
                for name, path in _PAGES:
                    _navigation_link(name, path, current=name == title)
                if context.is_admin:
                    _navigation_link("Keys", "/keys", current=title == "Keys")
        ui.button(icon="contrast", on_click=lambda: _toggle_dark(mode)).props(
            'flat round dense color=white aria-label="Toggle dark mode"'
        )
        if context is not None and context.signed_in:
            with ui.element("form").props(f'method="post" action="{BASE}/logout"'):
                ui.button("Log out").props('type="submit" flat dense color=white no-caps')
    # NiceGUI's page is the `main` landmark.
    with ui.element("div").props('id="main" tabindex="-1"').classes("stack").style("gap:1rem;outline:none"):
        yield


def _navigation_link(name: str, path: str, *, current: bool) -> None:
    with link(f"{BASE}{path}").classes("text-white") as shown:
        ui.label(name)
    if current:
        shown.props('aria-current="page"')


def _toggle_dark(mode: ui.dark_mode) -> None:
    """Toggle dark mode, and store the choice in a cookie for the next page."""
    mode.set_value(not mode.value)
    ui.run_javascript(f"document.cookie = 'basic_dark={int(bool(mode.value))}; path={BASE}; samesite=strict'")


def link(target: str) -> ui.element:
    """Return an `<a>` element; use it as a context manager to add its content."""
    return ui.element("a").props(f'href="{target}"')


def heading(text: str, level: int = 2) -> None:
    """Add a heading; level 1 is the title of the page."""
    with ui.element(f"h{level}"):
        ui.label(text)


def box() -> ui.element:
    """Return a bordered section; use it as a context manager to add its content."""
    return ui.element("section").classes("box stack")


def legend() -> None:
    """Add a legend of the colours of a text."""
    marks = (
        '<span class="by-draft">accepted draft tokens</span> · <span class="by-target">the target’s own tokens</span>'
    )
    ui.html(marks, sanitize=False).classes("small")
