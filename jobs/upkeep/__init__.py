"""Diagnosis and recovery: doctor and reconciler."""

from __future__ import annotations
