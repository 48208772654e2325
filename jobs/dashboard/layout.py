"""How every page looks: colours, styles, and the frame with the way around.

[look] <- pages.  All of it comes from this host: the policy sent with each page lets the browser ask no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nicegui import ui

BASE: Final = "/dashboard"  # where the pages lie
DRAFT, TARGET, GREY = "#1f9d63", "#9065d8", "#7d848e"  # accepted draft tokens; the target's own; all else

# Every source is this host; Vue compiles templates, hence the evals.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws: wss:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'"
)

_STYLES: Final = Path(__file__).with_name("style.css")


@contextmanager
def frame(title: str, *, dark: bool | None = None, signed_in: bool = False, bare: bool = False) -> Iterator[None]:
    """Put what is made inside below the head of the page. `bare`: without the way around; dark None: as the system."""
    ui.page_title(f"{title} · bASIC")
    ui.add_css(_STYLES)
    ui.colors(primary="#6b44b8", positive="#0d6b41", negative="#b3261e")
    mode = ui.dark_mode(dark)
    with (
        ui.header()
        .classes("items-center")
        .style("background:#2b2140;padding:.4rem 1rem;gap:1rem;flex-wrap:wrap;align-items:center")
    ):
        with link("#main").classes("skip"):  # inside, for the head of a page comes before all else
            ui.label("Skip to the content")
        with link(f"{BASE}/").classes("text-white").style("text-decoration:none;font-weight:700"):
            ui.label("bASIC")
        if not bare:
            with ui.element("nav").props('aria-label="Pages"').classes("line grow"):
                for name, place in (("Jobs", "/"), ("Statistics", "/stats"), ("Workers", "/workers")):
                    with link(f"{BASE}{place}").classes("text-white"):
                        ui.label(name)
        ui.button(icon="contrast", on_click=lambda: _turn(mode)).props(
            'flat round dense color=white aria-label="Dark or light"'
        )
        if signed_in:
            with ui.element("form").props(f'method="post" action="{BASE}/logout"'):
                ui.button("Log out").props('type="submit" flat dense color=white no-caps')
    with ui.element("main").props('id="main" tabindex="-1"').classes("stack").style("gap:1rem;outline:none"):
        yield


def _turn(mode: ui.dark_mode) -> None:
    """Change between dark and light; the browser keeps the choice for the next page."""
    mode.set_value(not mode.value)
    ui.run_javascript(f"document.cookie = 'basic_dark={int(bool(mode.value))}; path={BASE}; samesite=strict'")


def link(target: str) -> ui.element:
    """Return a real link, to be filled."""
    return ui.element("a").props(f'href="{target}"')


def heading(text: str, level: int = 2) -> None:
    """Write a heading."""
    with ui.element(f"h{level}"):
        ui.label(text)


def box() -> ui.element:
    """Return a bordered part of the page, to be filled."""
    return ui.element("section").classes("box stack")
