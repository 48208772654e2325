"""The contract of bASIC and its faces: messages, intake, queue, REST shim, client and command line. Never imports torch."""

from __future__ import annotations
