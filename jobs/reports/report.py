"""A report of one job as a single HTML file without external resources.

All text is escaped: prompts and model outputs are untrusted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from jobs.client.outcome import completed_with_failures, error_text, job_status_text
from jobs.client.results import JobInfo, Output, Statistics
from jobs.control_characters import safe
from jobs.reports.plots import PLOTS, svg
from jobs.reports.stats_tables import summary_rows

MAX_SAMPLES: Final = 12  # outputs in a report
_MAX_ERRORS: Final = 50  # distinct error messages in a report
_MAX_TEXT_CHARS: Final = 4_000  # of each sample

_STYLES: Final = """
:root { color-scheme: light dark; --line: #8a8f9855; --dim: light-dark(#5d636d, #a6adb8); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { overflow-wrap: anywhere; } td, .short { min-width: 5rem; } .short { white-space: nowrap; width: 14rem; }
@media (max-width: 40rem) { .short { white-space: normal; width: auto; } }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; } figure { margin: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; display: block; }
.text { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.dim { color: var(--dim); font-size: .9rem; } .warning { color: light-dark(#8a5300, #ffc46b); }
"""


def make_report(info: JobInfo, statistics: Statistics, outputs: Iterable[Output]) -> str:
    """Return the HTML. Reads the outputs once and keeps only the ones it shows in memory."""
    samples, errors = _samples_and_errors(outputs)
    title = f"Job {info.id}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="dim">{_status(info)}{_text(_about(info))}</p>',
        "<h2>Statistics</h2>",
        _table((), _totals(statistics), names="short"),
        f'<h2>Plots</h2><div class="plots">{"".join(_plot(statistics, name) for name in PLOTS)}</div>',
        _errors(errors),
        "<h2>Samples</h2>" if samples else "",
        *map(_sample, samples),
    ]
    return _page(title, "\n".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title><style>{_STYLES}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _samples_and_errors(outputs: Iterable[Output]) -> tuple[list[Output], Counter[tuple[str, str]]]:
    samples: list[Output] = []
    errors: Counter[tuple[str, str]] = Counter()
    for output in outputs:
        if output.error is not None:
            errors[output.error.code or "unknown", error_text(output.error)] += 1
        elif len(samples) < MAX_SAMPLES:
            samples.append(output)
    return samples, errors


def _status(info: JobInfo) -> str:
    words = _text(job_status_text(info))
    return (
        f'<strong class="warning">{words}</strong>'
        if completed_with_failures(info.status, info.request_counts.failed)
        else words
    )


def _about(info: JobInfo) -> str:
    submitted = datetime.fromtimestamp(info.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f" · {info.model} · {info.endpoint} · submitted {submitted}"


def _totals(statistics: Statistics) -> Sequence[tuple[str, str]]:
    """Return the totals, the speed-up first."""
    return sorted(summary_rows(statistics), key=lambda row: not row[0].endswith("plain"))


def _plot(statistics: Statistics, name: str) -> str:
    return f"<figure>{svg(statistics, name)}</figure>"


def _errors(errors: Counter[tuple[str, str]]) -> str:
    if not errors:
        return ""
    shown = errors.most_common(_MAX_ERRORS)
    left = Counter[str]()
    for (code, _), count in (errors - Counter(dict(shown))).items():
        left[code] += count
    rows = [(f"{code}: {message}", f"{count:,d}") for (code, message), count in shown]
    rows += [(f"{code}: other messages", f"{count:,d}") for code, count in left.most_common()]
    return "<h2>Errors</h2>" + _table(("error", "requests"), rows)


def _sample(output: Output) -> str:
    texts = "".join(f'<bdi class="text">{_text(choice.text[:_MAX_TEXT_CHARS])}</bdi>' for choice in output.choices)
    return f"<h3><bdi>{_text(output.custom_id)}</bdi></h3>{texts}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], names: str = "long") -> str:
    """Return a table. `names`: whether the first cells of the rows are short or long."""
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    name = f'<th scope="row" class="{names}">'
    lines = (f"<tr>{name}{_text(row[0])}</th>{''.join(f'<td>{_text(c)}</td>' for c in row[1:])}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{''.join(lines)}</tbody></table>"


def _text(text: str) -> str:
    return escape(safe(text))
