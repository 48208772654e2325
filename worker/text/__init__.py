"""Text in and out: chat templates, tokenizers, detokenizing, stop strings."""

from __future__ import annotations
