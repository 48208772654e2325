"""Open local files and URLs for reading, and for writing so that no partial file is left under the final name.

URLs are those of fsspec: s3://, gs://, az://, hf://, https:// and others, each with its own package and credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

from jobs.errors import InvalidValue, SetupError
from jobs.tables.packages import load

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://\S")


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a path."""
    return _URL.match(location) is not None


@contextmanager
def reading(location: str) -> Iterator[IO[bytes]]:
    """Open a file, or a URL; raise OSError for a file, InvalidValue for a URL that can't be read."""
    if not is_url(location):
        with Path(location).open("rb") as file:
            yield file
        return
    with ExitStack() as stack:
        with _explained(location, "read"):
            file = stack.enter_context(_fsspec().open(location, "rb"))
        yield file


@contextmanager
def writing(location: str) -> Iterator[IO[bytes]]:
    """Open a file or URL that is there, or replaced, only if the block ends without an error."""
    if is_url(location):
        with _writing_url(location) as file:
            yield file
        return
    path = Path(location)
    if path.exists() and not path.is_file():  # a device or a pipe
        with path.open("wb") as file:
            yield file
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _writing_url(location: str) -> Iterator[IO[bytes]]:
    """Open a URL in a transaction of its file system: bytes that were sent appear with its end, or not at all."""
    with _explained(location, "written"):
        filesystem, path = _fsspec().url_to_fs(location)
    with ExitStack() as stack:
        with _explained(location, "written"):
            stack.enter_context(filesystem.transaction)
            file = stack.enter_context(filesystem.open(path, "wb"))
        yield file
        with _explained(location, "written"):
            stack.close()


def _fsspec() -> Any:
    return load("fsspec.core", "URLs")


@contextmanager
def _explained(location: str, action: str) -> Iterator[None]:
    """Turn the errors of fsspec and its packages, which have no common class, into one sentence."""
    try:
        yield
    except (InvalidValue, SetupError):
        raise
    except ImportError as exc:
        raise SetupError(f"{location} can't be {action}: {exc}") from exc
    except FileNotFoundError as exc:
        raise InvalidValue(f"{location} does not exist.") from exc
    except IsADirectoryError as exc:
        raise InvalidValue(f"{location} is a directory; give the file in it.") from exc
    except Exception as exc:
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        raise InvalidValue(f"{location} can't be {action}: {reason}") from exc
