"""Each process of the unit tier builds a tree of commands once, as a process of a user does: it takes long."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
from _pytest.logging import catching_logs
from _pytest.runner import runtestprotocol
from typer import testing
from typer.main import get_command

testing._get_command = cache(get_command)  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Search the loggers that do not propagate once: pytest searches all 500, six times per test."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    apart = [logger for logger in loggers if not logger.propagate]
    search = catching_logs.__enter__

    def enter(self: catching_logs[Any]) -> Any:
        if self.level is not None:
            return search(self)
        self.attached_loggers = [logging.root, *apart]
        for logger in self.attached_loggers:
            logger.addHandler(self.handler)
        return self.handler

    catching_logs.__enter__ = enter  # type: ignore[method-assign]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, and report no set-up or teardown that passes: of 4,000 tests pytest-xdist sends each one."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
