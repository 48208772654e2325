"""What `kubectl kustomize` prints, of the few features that deploy/kubernetes uses, without kubectl."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

Manifest = dict[str, Any]

_KNOWN: Final = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}
_MERGED_BY_NAME: Final = {"containers", "env"}  # lists that a strategic merge patch changes item by item
_WITHOUT_NAMESPACE: Final = {"Namespace"}


def render(folder: Path) -> list[Manifest]:
    """Return the manifests of a kustomization, in no particular order."""
    said = YAML(typ="safe").load((folder / "kustomization.yaml").read_text())
    assert said.keys() <= _KNOWN, f"{folder}: this module does not know {said.keys() - _KNOWN}"
    manifests = [manifest for name in said["resources"] for manifest in _read(folder / name)]
    for patch in said.get("patches", []):
        (change,) = _read(folder / patch["path"])
        (at,) = [n for n, manifest in enumerate(manifests) if _identity(manifest) == _identity(change)]
        manifests[at] = _merged(manifests[at], change)
    for manifest in manifests:
        if "namespace" in said and manifest["kind"] not in _WITHOUT_NAMESPACE:
            manifest["metadata"]["namespace"] = said["namespace"]
        for container in containers(manifest):
            for image in said.get("images", []):
                _set_image(container, image)
    return manifests


def containers(manifest: Manifest) -> list[Manifest]:
    """Return the containers of a manifest's pods; none if it has no pods."""
    found: list[Manifest] = pod(manifest).get("containers", [])
    return found


def pod(manifest: Manifest) -> Manifest:
    """Return the pod's `spec` of a manifest; empty if it has no pods."""
    template = manifest.get("spec", {}).get("template", {})
    found: Manifest = template.get("spec", {})
    return found


def _read(path: Path) -> list[Manifest]:
    if path.is_dir():
        return render(path)
    return [manifest for manifest in YAML(typ="safe").load_all(path.read_text()) if manifest]


def _identity(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def _merged(ours: Any, change: Any, name: str = "") -> Any:
    if isinstance(ours, dict) and isinstance(change, dict):
        return {**ours, **{key: _merged(ours.get(key), value, key) for key, value in change.items()}}
    if isinstance(ours, list) and name in _MERGED_BY_NAME:
        by_name = {item["name"]: item for item in change}
        old = [_merged(item, by_name.pop(item["name"], {})) for item in ours]
        return [*by_name.values(), *old]
    return copy.deepcopy(change)


def _set_image(container: Manifest, image: Manifest) -> None:
    if container["image"] == image["name"]:
        container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
