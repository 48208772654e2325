"""Stream the outputs of a job as JSON lines: those that exist, in the job's order, or all, as requests end.

Clients may read slowly, so outputs are fetched page by page and no database connection is held in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from itertools import islice

from sqlalchemy.orm import Session

from jobs.api.dependencies import Services
from jobs.api.schemas import serializers
from jobs.json_lines import json_line
from storage import event_log, queries
from storage.event_log import Position
from storage.queries import JobView, OutputView
from storage.statuses import FINAL_JOB_STATUSES

CURSOR = r"^(\d{1,18}\.\d{1,10})?$"  # event number of the commit that ended the request, request index

_PAGE_SIZE = 200


@dataclass(frozen=True, slots=True)
class OutputSource:
    """The outputs of a job, as lines: all of them, or only `failed` requests, `with_prompt` or without."""

    services: Services
    job: JobView
    failed: bool = False
    with_prompt: bool = False

    def lines(self, after: int) -> Iterator[str]:
        """Yield the requests that have ended, in the order of the job, after an index."""
        while page := self._page(after):
            for output in page:
                yield self._line(output)
            after = page[-1].request_index

    async def followed(self, cursor: str) -> AsyncGenerator[str]:
        """Yield requests as they end, after a cursor, until the job has ended."""
        position = _position(cursor)
        async with self.services.hub.changes(self.job.id) as moments:
            async for _ in moments():
                # Read the status first: if it is final, the outputs read after it are complete.
                final = await asyncio.to_thread(self._is_final)
                while ended := await asyncio.to_thread(self._ended, position):
                    position = ended[-1][0]
                    for _, line in ended:
                        if line is not None:
                            yield line
                if final:
                    return

    def _page(self, after: int) -> list[OutputView]:
        with self.services.database.read() as session:
            return list(islice(self._outputs(session, after), _PAGE_SIZE))

    def _ended(self, position: Position) -> list[tuple[Position, str | None]]:
        """Return the lines of the next requests that ended; None in place of a line that is filtered out."""
        with self.services.database.read() as session:
            ended = event_log.ended_requests(session, self.job.id, position, _PAGE_SIZE)
            among = [index for _, index in ended]
            found = {output.request_index: output for output in self._outputs(session, among=among)}
        return [(place, self._followed(found[index], place) if index in found else None) for place, index in ended]

    def _outputs(self, session: Session, after: int = -1, among: list[int] | None = None) -> Iterator[OutputView]:
        return queries.outputs(
            session, self.job.id, after, without_result=self.failed, among=among, with_body=self.with_prompt
        )

    def _followed(self, output: OutputView, position: Position) -> str:
        return self._line(output, cursor=f"{position.number}.{position.request_index}")

    def _is_final(self) -> bool:
        with self.services.database.read() as session:
            return event_log.head(session, self.job.id).status in FINAL_JOB_STATUSES

    def _line(self, output: OutputView, **more: str) -> str:
        return json_line(serializers.output(output, self.job.endpoint, self.job.id) | more) + "\n"


def _position(cursor: str) -> Position:
    return Position(*map(int, cursor.split("."))) if cursor else Position(-1)
