"""Parse an upload: a multipart form with one file, whose bytes are passed on while they arrive.

Fields may come before or after the file, so they are validated at the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jobs.errors import BodyTooLarge, InvalidValue, MissingParameter, UnknownParameter, UnsupportedBody

FORM_BYTES: Final = 65_536  # allowance for the form around the file
_MAX_FIELD_BYTES: Final = 1_024
_MAX_NAME_CHARS: Final = 255
_FIELDS: Final = frozenset({"purpose", "expires_after", "expires_after[anchor]", "expires_after[seconds]"})
# Sent by gateways and clients; accepted and ignored.
_WITHOUT_EFFECT: Final = frozenset({"custom_llm_provider", "target_model_names", "user"})
_MIN_EXPIRY_S: Final = 3_600
_MAX_EXPIRY_S: Final = 2_592_000


@dataclass(slots=True)
class _FormPart:
    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)


class UploadForm:
    """Parses a form incrementally: collects its fields, and buffers file bytes in `pending` until they are taken."""

    def __init__(self, content_type: str, max_file_bytes: int, file_part: str = "file") -> None:
        """Read the boundary from the content type; raise UnsupportedBody if it is not multipart.

        The file is in the part of the form that is named `file_part`.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise UnsupportedBody(f"Send the file as multipart/form-data, in a part named {file_part}.")
        self._file_part = file_part
        self._size = 0  # file bytes received
        self.filename: str | None = None
        self.pending = bytearray()  # file bytes not taken yet
        self._max_file_bytes = max_file_bytes
        self._fields: dict[str, str] = {}
        self._part = _FormPart()
        self._header, self._value = bytearray(), bytearray()
        self._ended = False
        self._parser = self._make_parser(options[b"boundary"])

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body; raise InvalidValue and the like for a bad form."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise InvalidValue(f"Can't parse the form: {exc}.") from exc

    def end(self) -> None:
        """Check that the form is complete; call it at the end of the body."""
        if not self._ended:
            raise InvalidValue("The form ends inside a part.")
        if self.filename is None:
            raise MissingParameter(f"The form has no part named {self._file_part}.", param=self._file_part)

    def check_size(self, size: int) -> None:
        """Raise BodyTooLarge if a file of this size is beyond the limit."""
        if size > self._max_file_bytes:
            raise BodyTooLarge(
                f"The file is larger than the limit of {self._max_file_bytes} bytes.", param=self._file_part
            )

    def purpose(self) -> str:
        """Return the purpose of the file; raise if it is missing or unknown."""
        purpose = self._fields.get("purpose")
        if purpose is None:
            raise MissingParameter("The form has no field purpose; it must be batch.", param="purpose")
        if purpose != "batch":
            raise InvalidValue(f"must be batch, not {purpose[:40]!r}", param="purpose")
        return purpose

    def expires_after_s(self) -> float | None:
        """Return the lifetime of the file in seconds; None if the form has none."""
        if "expires_after" in self._fields:
            return _expires_after_s_of_json(self._fields["expires_after"])
        anchor, seconds = (self._fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
        if anchor is None and seconds is None:
            return None
        return read_expires_after_s(anchor, int(seconds) if seconds and seconds.isdecimal() else None, "expires_after")

    def _make_parser(self, boundary: bytes) -> MultipartParser:
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError as exc:
            raise InvalidValue(f"Can't parse the form: {exc}.") from exc

    def _begin(self) -> None:
        self._part = _FormPart()

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            self._part.name = options.get(b"name", b"").decode(errors="replace")
            if b"filename" in options:
                self._part.filename = _base_name(options[b"filename"].decode(errors="replace"))
        self._header.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        part = self._part
        if part.name == self._file_part:
            part.filename = part.filename or _base_name("")  # some clients send no filename
            if self.filename is not None:
                raise InvalidValue("The form has more than one file.", param=self._file_part)
            self.filename = part.filename
        elif part.name not in _FIELDS | _WITHOUT_EFFECT:
            raise UnknownParameter("Unknown field.", param=part.name[:64] or None)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.filename is None:
            self._part.data += data[start:end]
            if len(self._part.data) > _MAX_FIELD_BYTES:
                raise InvalidValue(f"The value is longer than {_MAX_FIELD_BYTES} bytes.", param=self._part.name)
            return
        self._size += end - start
        self.check_size(self._size)
        self.pending += data[start:end]

    def _part_end(self) -> None:
        if self._part.filename is None:
            self._fields[self._part.name] = self._part.data.decode(errors="replace")

    def _end(self) -> None:
        self._ended = True


def _expires_after_s_of_json(text: str) -> float:
    """Return the seconds of an `expires_after` given as one JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidValue("must be a JSON object with anchor and seconds", param="expires_after") from exc
    if not isinstance(value, dict):
        raise InvalidValue("must be a JSON object with anchor and seconds", param="expires_after")
    return read_expires_after_s(value.get("anchor"), value.get("seconds"), "expires_after")


def read_expires_after_s(anchor: object, seconds: object, param: str) -> float:
    """Return the seconds of an `expires_after`; raise InvalidValue if it is out of range."""
    if anchor != "created_at":
        raise InvalidValue("must be created_at", param=f"{param}.anchor")
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not _MIN_EXPIRY_S <= seconds <= _MAX_EXPIRY_S:
        raise InvalidValue(
            f"must be an integer from {_MIN_EXPIRY_S} to {_MAX_EXPIRY_S} (seconds)",
            param=f"{param}.seconds",
        )
    return float(seconds)


def _base_name(name: str) -> str:
    """Return the last part of a file name: clients may save under it, so it must hold no path."""
    last = name.replace("\\", "/").rpartition("/")[2].replace("\0", "")
    if len(last) > _MAX_NAME_CHARS:
        raise InvalidValue(f"The filename is longer than {_MAX_NAME_CHARS} characters.", param="file")
    return last or "file"
