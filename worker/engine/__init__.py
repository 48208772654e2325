"""The decoding engine: plain and OPT-Tree decoding of a batch, one packed forward a step. Imports nothing outside."""

from __future__ import annotations
