"""Servers that speak S3, one each for the whole session, and an environment that leads to nowhere else."""

import os
import uuid
from collections.abc import Iterator

import pytest
from storage_support import SWIFT_MISSING, Peer, clean_environment, running_moto, running_swift, swift_is_there


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with running_moto(tmp_path_factory.mktemp("moto")) as peer:
        yield peer


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    if not swift_is_there():
        pytest.skip(SWIFT_MISSING)
    with running_swift(tmp_path_factory.mktemp("swift")) as peer:
        yield peer


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No credentials, endpoint or settings of S3 from anywhere; set what the test wants."""
    clean = clean_environment(os.environ)
    for name in os.environ.keys() - clean.keys():
        monkeypatch.delenv(name)
    for name, value in clean.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def use(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Peer:
    for name, value in peer.environment().items():
        monkeypatch.setenv(name, value)
    return peer


@pytest.fixture
def moto(moto_server: Peer, no_aws: pytest.MonkeyPatch) -> Peer:
    """moto, to which the environment of the test leads."""
    return use(moto_server, no_aws)


@pytest.fixture
def swift(swift_server: Peer, no_aws: pytest.MonkeyPatch) -> Peer:
    """Swift, to which the environment of the test leads."""
    return use(swift_server, no_aws)


@pytest.fixture
def bucket() -> str:
    """A name that no other test has."""
    return f"test-{uuid.uuid4().hex[:16]}"
