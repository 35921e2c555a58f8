"""The chart grants the operator what it asks of the API server in the tests of this folder, and no more."""

from pathlib import Path

import pytest

from tests.fakes.audit_log import Permission
from tests.fakes.chart import Chart, operator_rules, permissions

BLOCK_DELETION: Permission = ("vpmoe.dev", "distillruns/finalizers", "update")
"""Admission checks it when the operator creates a child that blocks the deletion of its run."""
CREATE_CRD: Permission = ("apiextensions.k8s.io", "customresourcedefinitions", "create")
"""Only the first installation in a cluster creates the CRD."""
UNRECORDED = {BLOCK_DELETION, CREATE_CRD}
"""Permissions that the operator needs although the audit log may have no request that names them."""


@pytest.fixture(scope="module")
def granted(helm: Path) -> set[Permission]:
    """Permissions of the operator with the default values."""
    return permissions(operator_rules(Chart(helm).render(namespace="vpmoe-system"), "vpmoe-system"))


def test_the_operator_asks_for_nothing_that_its_roles_do_not_grant(
    granted: set[Permission], permissions_used_so_far: dict[Permission, str]
) -> None:
    missing = {used: example for used, example in permissions_used_so_far.items() if used not in granted}
    assert not missing, "add these to operator.rules in charts/distill-operator, or do without them"


def test_every_permission_of_the_operator_is_used(
    granted: set[Permission], permissions_used_by_all_tests: dict[Permission, str]
) -> None:
    unused = granted - permissions_used_by_all_tests.keys() - UNRECORDED
    assert not unused, "remove these from the chart's roles, or test what needs them"
    assert granted >= UNRECORDED
