"""The tests that compare what the operator has asked of the API server run last."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from devcluster import dev, install
from devcluster.access import Cluster
from tests.fakes.audit_log import Permission, permissions_used

STARTED = datetime.now(UTC)
FOLDER = Path(__file__).parent


@pytest.fixture
def permissions_used_so_far(cluster: Cluster) -> dict[Permission, str]:
    """The permissions that the operator has used in this session, with an example. Its tests run last."""
    if cluster.kubeconfig != dev.CLUSTER.kubeconfig:
        pytest.skip("the audit log of your own cluster's API server is not read")
    account = f"system:serviceaccount:{install.NAMESPACE}:distill-operator"
    return permissions_used(dev.STATE / "logs", account, STARTED)


@pytest.fixture
def permissions_used_by_all_tests(
    permissions_used_so_far: dict[Permission, str],
) -> dict[Permission, str]:
    """The same. Its tests run only if all tests of this folder do."""
    return permissions_used_so_far


@pytest.hookimpl(trylast=True)  # after pytest has selected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def uses(item: pytest.Item, fixture: str) -> bool:
        return fixture in getattr(item, "fixturenames", ())

    last = [item for item in items if uses(item, "permissions_used_so_far")]
    whole = [item for item in last if uses(item, "permissions_used_by_all_tests")]
    selected = config.option.keyword or any("::" in argument for argument in config.args)
    if selected or not set(FOLDER.glob("test_*.py")) <= {item.path for item in items}:
        config.hook.pytest_deselected(items=whole)
        last = [item for item in last if item not in whole]
    items[:] = [item for item in items if not uses(item, "permissions_used_so_far")] + last
