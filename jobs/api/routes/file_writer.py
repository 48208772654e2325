"""Write the bytes of an upload into a file of the database while they arrive."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.api.auth.caller import Caller
from jobs.api.dependencies import Services
from jobs.api.http.multipart import UploadForm
from jobs.tables.gunzip import MaybeGzip, without_gz
from storage import files
from storage.files import CHUNK_BYTES


class FileWriter:
    """Writes one file, one transaction per chunk: a slow client must not hold the write lock.

    With `unpack`, a gzip file is stored unpacked, so that a batch reads its lines and the limit counts what it holds.
    """

    def __init__(self, services: Services, caller: Caller, file_id: str, *, unpack: bool) -> None:
        self.file_id = file_id
        self.size = 0
        self.chunks = 0
        self._services = services
        self._caller = caller
        self._file = MaybeGzip() if unpack else None
        self._pending = bytearray()

    def take(self, form: UploadForm, data: bytes) -> None:
        """Parse the next bytes of the body, and write the chunks that are complete."""
        form.feed(data)
        taken = bytes(form.pending)
        form.pending.clear()
        self._store(form, iter((taken,)) if self._file is None else self._file.feed(taken))

    def end(self, form: UploadForm) -> None:
        """Write the rest. The file stays invisible."""
        self._store(form, iter(()) if self._file is None else self._file.end())
        if self._pending or not self.chunks:
            self._write(form, len(self._pending))

    def drop(self) -> None:
        """Delete the chunks of an upload that failed."""
        if self.chunks:
            with self._services.database.write() as session:
                files.drop_file(session, self.file_id)

    def _store(self, form: UploadForm, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            self._pending += piece
            self.size += len(piece)
            form.check_size(self.size)
            while len(self._pending) >= CHUNK_BYTES:
                self._write(form, CHUNK_BYTES)

    def _write(self, form: UploadForm, size: int) -> None:
        data = bytes(self._pending[:size])
        del self._pending[:size]
        name = form.filename or ""
        with self._services.database.write() as session:
            if not self.chunks:
                stored = without_gz(name) if self._file is not None and self._file.is_gzip else name
                files.begin_file(session, self.file_id, "batch", stored, self._caller.key_id)
            files.append_chunk(session, self.file_id, self.chunks, data)
        self.chunks += 1
