"""The images: what the Dockerfile copies is in its context, what it installs is hashed, and code comes last."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = {stage.split(maxsplit=1)[0]: stage for stage in re.split(r"^FROM \S+ AS ", DOCKERFILE, flags=re.MULTILINE)[1:]}
IMAGES = {"api": ("api", "otel", "postgres"), "worker": ("worker", "otel", "postgres")}
ENVIRONMENT: dict[str, Any] = {**default_environment(), "python_version": "3.11", "python_full_version": "3.11.13"}


def locked(image: str) -> dict[str, str]:
    """Return the version of each package of an image; every one must have a hash."""
    text = (ROOT / f"requirements/{image}.txt").read_text()
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        pinned = re.match(r"([\w.-]+)==([\w.]+)", entry)
        assert pinned is not None, entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"{pinned[1]} has no hash"
        found[canonicalize_name(pinned[1])] = pinned[2]
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    """Return what a package requires: ours as pyproject.toml says now, others as they are installed."""
    if name == "basic-batch":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lines = [
            *project["dependencies"],
            *(line for one in extras - {""} for line in project["optional-dependencies"][one]),
        ]
        return [Requirement(line) for line in lines]
    try:
        return [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:  # such as CUDA libraries, on a machine without
        return []


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Yield the packages that an installed package needs, and theirs."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    for wanted in requirements(name, extras):
        if wanted.marker is None or any(wanted.marker.evaluate(ENVIRONMENT | {"extra": extra}) for extra in extras):
            yield canonicalize_name(wanted.name)
            yield from needed(wanted.name, frozenset({"", *wanted.extras}), seen)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_what_its_extras_need_in_the_versions_of_the_tests(image: str) -> None:
    found, pinned = locked(image), pins()
    assert {name: version for name, version in found.items() if pinned.get(name) != version} == {}, "run make lock"
    wanted = set(needed("basic-batch", frozenset({"", *IMAGES[image]}), set())) - {"basic-batch"}
    assert wanted - found.keys() == set(), "run make lock"
    assert ("torch" in found) == (image == "worker")
    assert "setuptools" in found, "our own wheel is built without the network"


@pytest.mark.parametrize("image", IMAGES)
def test_code_is_copied_after_the_packages_are_installed(image: str) -> None:
    steps = re.findall(r"^(COPY|RUN) (.*)", STAGES[image], re.MULTILINE)
    installs = [n for n, step in enumerate(steps) if step[1].startswith("pip install")]
    assert steps[installs[0]][1] == (
        f"pip install --require-hashes --only-binary :all: --requirement requirements/{image}.txt"
    )
    before = [source for kind, source in steps[: installs[0]] if kind == "COPY"]
    assert before == [f"requirements/{image}.txt requirements/"], "a change of code would install torch again"
    assert steps[installs[1]][1] == "pip install --no-deps --no-build-isolation ."


def test_the_base_image_has_a_digest() -> None:
    (named,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.13-slim-bookworm@sha256:[0-9a-f]{64}", named)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}", "base", "base"]


def test_everything_that_is_copied_exists_and_is_in_the_build_context() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            sent = True
            for rule in rules:
                pattern = rule.removeprefix("!")
                if any(fnmatch(part, pattern) for part in (source, source.partition("/")[0])):
                    sent = rule.startswith("!")
            assert sent, f"{source} is left out by .dockerignore"


def test_the_build_context_has_every_package_of_the_wheel() -> None:
    copied = set(re.findall(r"^COPY (\w+) \w+$", DOCKERFILE, re.MULTILINE))
    assert copied == {"basic_batch", "jobs", "storage", "migrations", "worker"}
