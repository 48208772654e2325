"""The results of a job as JSON lines: those there are, in the job's order, or all of them, as they come.

A reader may be slow, so no connection to the database is held while it reads: results are fetched a page at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from itertools import islice

from jobs.api.dependencies import Services
from jobs.api.schemas import serializers
from jobs.json_lines import json_line
from storage import event_log, queries
from storage.event_log import Position
from storage.queries import JobView, OutputView
from storage.statuses import FINAL_JOB_STATUSES

CURSOR = r"^(\d{1,18}\.\d{1,10})?$"  # number of the commit that ended the request, and the request's index

_AT_ONCE = 200


def output_lines(services: Services, job: JobView, after: int, failed: bool) -> Iterator[str]:
    """Yield the requests that have ended, in the order of the job, from behind an index."""
    while page := _page(services, job.id, after, failed):
        for output in page:
            yield _line(output, job.endpoint)
        after = page[-1].request_index


async def followed_lines(services: Services, job: JobView, cursor: str, failed: bool) -> AsyncGenerator[str]:
    """Yield requests as they end, from behind a cursor, until the job has ended."""
    place = _place(cursor)
    async with services.broadcast.news(job.id) as moments:
        async for _ in moments():
            final = await asyncio.to_thread(
                _is_final, services, job.id
            )  # first: what is read then is all there will be
            while ended := await asyncio.to_thread(_ended, services, job, place, failed):
                place = ended[-1][0]
                for _, line in ended:
                    if line is not None:
                        yield line
            if final:
                return


def _page(services: Services, job_id: str, after: int, failed: bool) -> list[OutputView]:
    with services.database.read() as session:
        return list(islice(queries.outputs(session, job_id, after, without_result=failed), _AT_ONCE))


def _ended(services: Services, job: JobView, place: Position, failed: bool) -> list[tuple[Position, str | None]]:
    """Return the lines of the next requests that ended, with nothing for those that the reader does not want."""
    with services.database.read() as session:
        places = event_log.ended_requests(session, job.id, place, _AT_ONCE)
        among = [index for _, index in places]
        found = {
            output.request_index: output
            for output in queries.outputs(session, job.id, without_result=failed, among=among)
        }
    return [(place, _followed(found[index], job, place) if index in found else None) for place, index in places]


def _followed(output: OutputView, job: JobView, place: Position) -> str:
    return _line(output, job.endpoint, cursor=f"{place.number}.{place.request_index}")


def _is_final(services: Services, job_id: str) -> bool:
    with services.database.read() as session:
        return event_log.head(session, job_id).status in FINAL_JOB_STATUSES


def _place(cursor: str) -> Position:
    return Position(*map(int, cursor.split("."))) if cursor else Position(-1)


def _line(output: OutputView, endpoint: str, **more: str) -> str:
    return json_line(serializers.output(output, endpoint) | more) + "\n"
