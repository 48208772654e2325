"""The web page on the shim: jobs while they run, their texts, their draft trees and their numbers."""

from __future__ import annotations
