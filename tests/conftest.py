"""Fixtures that more than one folder of tests uses."""

from collections.abc import Iterator

import pytest
import structlog
from api_support import running_media_daemon
from daemon_support import Daemon, running_daemon
from storage_support import Peer, running_moto
from structlog.testing import LogCapture

pytest_plugins = ["journal_fixtures", "storage_fixtures"]


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the embedded engine, for tests that leave it as they found it."""
    with running_daemon(tmp_path_factory.mktemp("shared-daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A moto of its own for the daemons of the tests: what they store is nobody else's."""
    with running_moto(tmp_path_factory.mktemp("s3-server")) as peer:
        yield peer


@pytest.fixture(scope="session")
def media_daemon(tmp_path_factory: pytest.TempPathFactory, s3_server: Peer) -> Iterator[Daemon]:
    """A daemon with the embedded engine that may fetch from 127.0.0.1 and has an S3."""
    with running_media_daemon(tmp_path_factory.mktemp("media-daemon"), s3_server) as daemon:
        yield daemon


@pytest.fixture
def log_output() -> Iterator[LogCapture]:
    """The events logged during the test."""
    capture = LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[capture])
    yield capture
    structlog.configure(**before)
