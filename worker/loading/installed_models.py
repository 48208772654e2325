"""The models on this machine: those that bASIC has converted, and those in the cache of the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.errors import NotFound, SetupError
from worker.loading.model_store import PACKAGED

Source = Literal["packaged", "converted", "hub"]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model, or a packaged one that is not downloaded yet (`bytes` 0). Facts from its configuration, where known."""

    name: str
    source: Source
    bytes: int
    directory: str
    architecture: str = ""
    dtype: str = ""
    context_tokens: int | None = None

    @property
    def installed(self) -> bool:
        """Whether the model is on this machine."""
        return self.bytes > 0

    def is_served_as(self, name: str) -> bool:
        """Return whether a worker with this target or draft may have loaded the model."""
        if self.source != "converted":
            return self.name == Path(name).name if "/" not in self.name else self.name == name
        return self.name.rpartition("-")[0] == Path(name).name.removesuffix(".gguf")


def installed_models(cache_dir: Path) -> list[InstalledModel]:
    """Return the models on this machine, and the packaged ones that `basic models pull` would download, by name."""
    folder = cache_dir.expanduser() / "models"
    found = [_converted(entry) for entry in _folders(folder)]
    names = {model.name for model in found}
    missing = (InstalledModel(name, "packaged", 0, "") for name in PACKAGED if name not in names)
    return sorted([*found, *missing, *_in_hub_cache()], key=lambda model: model.name.casefold())


def remove(name: str, cache_dir: Path, served: Collection[str]) -> InstalledModel:
    """Delete a model from this machine and return what it was.

    Raise NotFound if it is not installed, and SetupError if it is one of the targets and drafts in `served`.
    """
    models = [model for model in installed_models(cache_dir) if model.installed]
    model = next((model for model in models if model.name == name), None)
    if model is None:
        known = ", ".join(model.name for model in models) or "none"
        raise NotFound(f"{name} is not on this machine; installed: {known}")
    users = [user for user in served if model.is_served_as(user)]
    if users:
        raise SetupError(f"a worker of this machine serves {users[0]}; stop it first, or remove with --force")
    try:
        if model.source == "hub":
            _remove_from_hub_cache(name)
        else:
            _remove_folder(Path(model.directory))
    except OSError as error:
        raise SetupError(f"{model.directory} could not be deleted: {error.strerror or error}") from error
    return model


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the finished models in the cache; names that begin with a dot are downloads and removals under way."""
    if folder.is_dir():
        yield from (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _converted(folder: Path) -> InstalledModel:
    source: Source = "packaged" if folder.name in PACKAGED else "converted"
    return InstalledModel(folder.name, source, _size(folder), str(folder), **_facts(folder))


def _in_hub_cache() -> Iterator[InstalledModel]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in repos:
        revisions = sorted(repo.revisions, key=lambda revision: revision.last_modified)
        if repo.repo_type == "model" and revisions and repo.size_on_disk:
            newest = revisions[-1].snapshot_path
            yield InstalledModel(repo.repo_id, "hub", repo.size_on_disk, str(newest), **_facts(newest))


def _remove_from_hub_cache(name: str) -> None:
    from huggingface_hub import constants, scan_cache_dir

    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    hashes = (
        revision.commit_hash
        for repo in cache.repos
        if (repo.repo_type, repo.repo_id) == ("model", name)
        for revision in repo.revisions
    )
    cache.delete_revisions(*hashes).execute()


def _remove_folder(folder: Path) -> None:
    """Delete a model at once for other processes: none finds a part of it."""
    hidden = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _facts(folder: Path) -> dict[str, Any]:
    """Return architecture, dtype and context of a model, where its configuration says them."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        return {}
    names: Iterable[Any] = config.get("architectures") or [""]
    context = text.get("max_position_embeddings")
    return {
        "architecture": str(next(iter(names))),
        "dtype": str(text.get("dtype") or text.get("torch_dtype") or ""),
        "context_tokens": context if isinstance(context, int) else None,
    }
