"""Fixtures that more than one folder of tests uses."""

from collections.abc import Iterator

import pytest
import structlog
from daemon_support import Daemon, running_daemon
from structlog.testing import LogCapture

pytest_plugins = ["storage_fixtures"]


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the embedded engine, for tests that leave it as they found it."""
    with running_daemon(tmp_path_factory.mktemp("shared-daemon")) as daemon:
        yield daemon


@pytest.fixture
def log_output() -> Iterator[LogCapture]:
    """The events logged during the test."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture])
    yield capture
    structlog.configure(**before)
