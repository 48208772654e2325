"""Which tests run in one process, when several run at once: those that share servers."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

# Files whose tests share one `basic up` with SmolLM2.
_ONE_SERVICE = frozenset(
    {
        "test_client_libraries.py",
        "test_estimate.py",
        "test_examples.py",
        "test_one_batch.py",
        "test_openai.py",
        "test_tool_calls.py",
    }
)
# Files whose tests start servers of their own, each of them or each process: their tests run anywhere.
_INDEPENDENT = frozenset(
    {
        "test_client_only.py",
        "test_client_processes.py",
        "test_ingest_process.py",
        "test_local.py",
        "test_migrations.py",
        "test_nodes.py",
        "test_pressure.py",
        "test_ranks.py",
        "test_request_process.py",
        "test_tracing.py",
        "test_worker_process.py",
    }
)


class ByServers(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Tests of a file run in one process, because they share its servers, unless a table above says otherwise."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        name = file.rpartition("/")[2]
        if name in _INDEPENDENT:
            return nodeid
        return "one service" if name in _ONE_SERVICE else file
