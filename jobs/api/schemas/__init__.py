"""Response models, serializers and the OpenAPI document."""

from __future__ import annotations
