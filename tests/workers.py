"""Distribution of tests over the workers of pytest-xdist."""

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

# Their files share running systems, or answers that take long to get.
SHARING = ("tests/chaos", "tests/clients")


class SharedScheduling(LoadScopeScheduling):
    """Gives a worker all tests of a file, or of a folder of SHARING, in the order in which they were collected.

    So fixtures are set up once, and as alphabet has it the folders that run longest begin first.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = PurePath(file).parent.as_posix()
        return folder if folder in SHARING else file
