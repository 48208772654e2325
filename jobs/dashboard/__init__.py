"""The dashboard of the API server: jobs while they run, their texts, draft trees and statistics."""

from __future__ import annotations
