"""Fixtures of the tests of chaos: requests, and the answers of a system in which nothing goes wrong."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chaos_requests import KINDS, files_to_serve
from chaos_storm import World, quiet_world
from system import file_server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Once for all: to ask for everything takes longer than most of the tests."""
    with file_server(files_to_serve()) as files:
        yield await quiet_world(tmp_path_factory.mktemp("chaos"), files, len(KINDS))
