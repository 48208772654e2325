"""Each process of the unit tier builds a tree of commands once, as a process of a user does: it takes long."""

from __future__ import annotations

from functools import cache

import pytest
from _pytest.runner import runtestprotocol
from typer import testing
from typer.main import get_command

testing._get_command = cache(get_command)  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, and report no set-up or teardown that passes: of 4,000 tests pytest-xdist sends each one."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
