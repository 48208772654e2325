"""Triton kernels and fused layers for GPUs."""

from __future__ import annotations
