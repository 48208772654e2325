"""The models that jobs may name, under the names that people use for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jobs.errors import UnknownModel
from jobs.messages import model_name
from jobs.settings import DEFAULT_TARGET, JobsSettings
from storage import queries
from storage.session import Database

_HUB_IDS: Final = {DEFAULT_TARGET: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # of models with a name of our own
_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PREFIX: Final = re.compile(r"(?:openai|hosted_vllm)/", re.IGNORECASE)  # of LiteLLM and clients that follow it


class ModelNames:
    """Finds the model that a name means.

    A name may differ in case, carry the prefix of a client library, be an alias of the settings, or be the hub id of a
    model that is served under its local name, and the reverse. A name that could mean two models means none.
    """

    def __init__(
        self,
        context_tokens: Mapping[str, int | None],
        aliases: Mapping[str, str] | None = None,
        default: str = "",
    ) -> None:
        """Take the models with their context length in tokens (None: unknown), and other names for them."""
        self._context_tokens = context_tokens
        self._aliases = {alias.casefold(): name for alias, name in (aliases or {}).items()}
        self.default = default

    @property
    def names(self) -> list[str]:
        """The models by their own names, sorted."""
        return sorted(self._context_tokens)

    def context_tokens(self, name: str) -> int | None:
        """Return the context length of a model in tokens; None if it is unknown."""
        return self._context_tokens[name]

    def find(self, asked: Any) -> str | None:
        """Return the model's own name; None if no model, or more than one, has this name."""
        if not isinstance(asked, str):
            return None
        if asked in self._context_tokens:
            return asked
        for spelling in _without_prefixes(asked):
            found = self._match(self._aliases.get(spelling.casefold(), spelling))
            if found is not None:
                return found
        return None

    def resolve(self, asked: Any) -> str:
        """Return the model's own name; raise UnknownModel, naming the models there are."""
        found = self.find(asked)
        if found is None:
            raise UnknownModel(self.refusal(asked), param="model")
        return found

    def refusal(self, asked: Any) -> str:
        """Return the sentence for an unknown name."""
        return (
            f"There is no model {str(asked)[:80]!r}. Available: {', '.join(self.names)}. "
            "BASIC_MODEL_ALIASES gives a model more names."
        )

    def _match(self, name: str) -> str | None:
        if name in self._context_tokens:
            return name
        for is_match in (_same_in_any_case, _is_local_and_hub_name):
            matches = [known for known in self._context_tokens if is_match(known, name)]
            if matches:
                return matches[0] if len(matches) == 1 else None
        return None


def known_models(database: Database, settings: JobsSettings) -> ModelNames:
    """Return the models that a job may name: those that workers serve, and the target of this installation."""
    with database.connect() as session:
        served: dict[str, int | None] = {model.target: model.context_tokens for model in queries.models(session)}
    own = {target: model_name(target) for target in settings.targets}
    return ModelNames({**dict.fromkeys(own.values()), **served}, own | settings.aliases, settings.default_model)


def _without_prefixes(name: str) -> Iterator[str]:
    """Yield a name, then the name without one prefix of a client library, without two, and so on."""
    yield name
    while found := _PREFIX.match(name):
        name = name[found.end() :]
        yield name


def _same_in_any_case(known: str, name: str) -> bool:
    return known.casefold() == name.casefold()


def _is_local_and_hub_name(known: str, name: str) -> bool:
    """Return whether one name is a hub id and the other its last part. Our own names stand for one hub id each."""
    local, hub_id = (known, name) if "/" not in known else (name, known)
    if "/" in local or not _HUB_ID.fullmatch(hub_id):
        return False
    own = _HUB_IDS.get(local.casefold(), hub_id)
    return _same_in_any_case(hub_id, own) and _same_in_any_case(hub_id.partition("/")[2], local)
