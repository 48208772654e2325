"""Weights in int8 and FP8: quantising a model at load, and reading FP8 checkpoints."""

from __future__ import annotations
