"""What pyproject.toml can't say: where an installation keeps the migrations.

They go to basic_batch/migrations, because another distribution may bring a top-level `migrations`.
"""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["basic_batch", "jobs", "jobs.*", "storage", "storage.*", "worker", "worker.*"]),
        "basic_batch.migrations",
        "basic_batch.migrations.versions",
        "migrations",
    ],
    package_dir={"basic_batch.migrations": "migrations", "migrations": "basic_batch/alias/migrations"},
)
