"""The run that nobody disturbs, which every fault test compares with."""

import pytest

from tests.faults.training import Disturbed, results
from tests.small import Small


@pytest.fixture(scope="session")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = Disturbed(tmp_path_factory.mktemp("undisturbed"), small.base, small.prepared)
    run.start()
    status, said = run.end()
    assert status == 0, said
    return results(run.record())
