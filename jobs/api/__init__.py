"""The API server: jobs, files, batches and completions over HTTP, with OpenAI's response and error formats."""

from __future__ import annotations
