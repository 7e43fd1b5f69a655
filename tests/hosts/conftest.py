"""Hosts for the tests; skipped with the reason where this machine cannot have any."""

from collections.abc import Iterator

import pytest

from tests.hosts import namespaces
from tests.hosts.namespaces import Hosts


def _made(factory: pytest.TempPathFactory, count: int) -> Iterator[Hosts]:
    try:
        with namespaces.hosts(factory.mktemp(f"hosts{count}"), count) as made:
            yield made
    except namespaces.NoHosts as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts."""
    yield from _made(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts."""
    yield from _made(tmp_path_factory, 3)
