# SPDX-License-Identifier: Apache-2.0
"""A cluster of two nodes, and what one machine makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.units.cases import Alone


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield one
    one.shutdown()


@pytest.fixture
def cluster(head: Any) -> Any:
    """Return a cluster of two nodes, where an earlier test killed one, too."""
    if not head.worker_nodes:
        head.add_node(num_cpus=1)
        head.wait_for_nodes(timeout=120)  # until the killed one counts as dead
    return head


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))
