"""C kernels and the fused model for CPUs."""

from __future__ import annotations
