"""The decoding engine: plain and OPT-Tree decoding of a batch on one packed forward. Imports nothing of ours outside."""

from __future__ import annotations
