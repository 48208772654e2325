"""The node: the only package that imports torch. Engine, drafters, and the Celery worker around them."""

from __future__ import annotations
