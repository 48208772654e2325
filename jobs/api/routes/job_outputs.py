"""Stream the outputs of a job as JSON lines: those that exist, in the job's order, or all, as requests end.

Clients may read slowly, so outputs are fetched page by page and no database connection is held in between.
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

CURSOR = r"^(\d{1,18}\.\d{1,10})?$"  # event number of the commit that ended the request, request index

_PAGE_SIZE = 200


def output_lines(services: Services, job: JobView, after: int, failed: bool) -> Iterator[str]:
    """Yield the requests that have ended, in the order of the job, after an index."""
    while page := _page(services, job.id, after, failed):
        for output in page:
            yield _line(output, job.endpoint, job.id)
        after = page[-1].request_index


async def followed_lines(services: Services, job: JobView, cursor: str, failed: bool) -> AsyncGenerator[str]:
    """Yield requests as they end, after a cursor, until the job has ended."""
    position = _position(cursor)
    async with services.hub.changes(job.id) as moments:
        async for _ in moments():
            # Read the status first: if it is final, the outputs read after it are complete.
            final = await asyncio.to_thread(_is_final, services, job.id)
            while ended := await asyncio.to_thread(_ended, services, job, position, failed):
                position = ended[-1][0]
                for _, line in ended:
                    if line is not None:
                        yield line
            if final:
                return


def _page(services: Services, job_id: str, after: int, failed: bool) -> list[OutputView]:
    with services.database.read() as session:
        return list(islice(queries.outputs(session, job_id, after, without_result=failed), _PAGE_SIZE))


def _ended(services: Services, job: JobView, position: Position, failed: bool) -> list[tuple[Position, str | None]]:
    """Return the lines of the next requests that ended; None in place of a line that is filtered out."""
    with services.database.read() as session:
        ended = event_log.ended_requests(session, job.id, position, _PAGE_SIZE)
        among = [index for _, index in ended]
        found = {
            output.request_index: output
            for output in queries.outputs(session, job.id, without_result=failed, among=among)
        }
    return [(position, _followed(found[index], job, position) if index in found else None) for position, index in ended]


def _followed(output: OutputView, job: JobView, position: Position) -> str:
    return _line(output, job.endpoint, job.id, cursor=f"{position.number}.{position.request_index}")


def _is_final(services: Services, job_id: str) -> bool:
    with services.database.read() as session:
        return event_log.head(session, job_id).status in FINAL_JOB_STATUSES


def _position(cursor: str) -> Position:
    return Position(*map(int, cursor.split("."))) if cursor else Position(-1)


def _line(output: OutputView, endpoint: str, job_id: str, **more: str) -> str:
    return json_line(serializers.output(output, endpoint, job_id) | more) + "\n"
