"""Messages of the leader: commands as one numbered int64 array with checksums.

A step is one message: what happened to KV memory since the step before, and its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from worker.engine.errors import MessageRefused
from worker.engine.parallel.commands import RankCommand, decode
from worker.engine.segments import IntArray

HEAD = 4  # words before the commands: number, length of the commands, their checksum, that of these three


def sealed(commands: Sequence[RankCommand], number: int) -> IntArray:
    """Return commands as message `number`."""
    body = np.concatenate([command.encode() for command in commands])
    head = np.array([number, len(body), crc32(body.data)], np.int64)
    return np.concatenate([head, [crc32(head.data)], body])


def body_length(words: IntArray, number: int) -> int:
    """Return the length of the commands of message `number`, which starts with these words.

    Raises MessageRefused if they are damaged, or those of another message.
    """
    head: list[int] = words[:HEAD].tolist()
    found, length, _, checksum = head
    if crc32(np.ascontiguousarray(words[: HEAD - 1]).data) != checksum:
        raise MessageRefused(f"Message {number} from the first rank is damaged: it starts {head}; the replica restarts")
    if found != number:
        raise MessageRefused(f"Message {found} came from the first rank where {number} was due; the replica restarts")
    return int(length)


def opened(words: IntArray, number: int) -> list[RankCommand]:
    """Return the commands of message `number`. Raises MessageRefused if it is damaged or another message."""
    length = body_length(words, number)
    body = np.ascontiguousarray(words[HEAD : HEAD + length])
    if len(body) != length or crc32(body.data) != int(words[2]):
        raise MessageRefused(f"Message {number} from the first rank is damaged; the replica restarts")
    return list(decode(body))
