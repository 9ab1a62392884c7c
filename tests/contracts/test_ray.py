"""A comparison on a Ray cluster of two nodes gives the cells that one process gives, also when a worker or a node is
killed in the middle. `make test-ray` installs Ray; without it these are skipped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from test_compare import records, run

from spinfold.cluster import Lost, connected, on_cluster
from spinfold.errors import SpinfoldError

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
GRID: dict[str, Any] = {
    "entries": ["none", "quarot", "optrot:fit.steps=2", "broken=dfrot:fit.objective=kurtosis"],
    "bits": ["W4A4KV4", "W4A16"],
    "rounding": ["rtn"],
    "seeds": [0, 1],
}
LONG = 120


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The head with one core; each test adds its own second node."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_failure_threshold": "2"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where pytest has found this file's neighbours
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield made
        made.shutdown()


def counting(folder: Path, job: str) -> Iterator[tuple[str, int, str]]:
    """0 ... 3 with the node they come from. A job called `mortal` kills its process once, `doomed` always."""
    for i in range(4):
        yield job, i, ray.get_runtime_context().get_node_id()
        if i == 1 and job == "waiting":
            (folder / "waits").touch()
            while not (folder / "go").exists():
                signal.sigtimedwait([], 0.05)
        if i == 1 and (job == "doomed" or (job == "mortal" and not (folder / "died").exists())):
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_s_job_is_done_again(cluster: Any, tmp_path: Path) -> None:
    with connected(cluster.address) as gpus:
        assert gpus == 0
        found = list(on_cluster(partial(counting, tmp_path), ["calm", "mortal", "doomed"]))
    for index, job in enumerate(["calm", "mortal"]):
        assert [(name, i) for at, (name, i, _) in found_of(found, index)] == [(job, i) for i in range(4)]
    *some, (_, last) = [x for x in found if x[0] == 2]
    assert isinstance(last, Lost) and len(some) == 2 and (tmp_path / "died").exists()


def found_of(found: list[tuple[int, Any]], index: int) -> list[tuple[int, Any]]:
    """The results of one job."""
    return [x for x in found if x[0] == index]


def raising(_: str) -> Iterator[int]:
    raise SpinfoldError("It can't be done.")
    yield 0


@pytest.mark.slow
def test_what_a_job_raises_is_raised(cluster: Any) -> None:
    with connected(cluster.address), pytest.raises(SpinfoldError, match="can't be done"):
        list(on_cluster(raising, ["x"]))


@pytest.mark.slow
def test_a_comparison_survives_the_loss_of_a_node(cluster: Any, tmp_path: Path) -> None:
    model, text = tiny_run.tiny_model(tmp_path / "model", "llama"), tmp_path / "text.txt"
    text.write_text(tiny_run.TEXT, "utf-8")
    alone = run(model, tmp_path / "alone", text, GRID)
    second, seen = cluster.add_node(num_cpus=1), []
    cluster.wait_for_nodes()

    def lose_a_node(cell: dict[str, Any]) -> None:
        seen.append(cell["label"])
        if len(seen) == 1:
            cluster.remove_node(second, allow_graceful=False)

    there = run(model, tmp_path / "there", text, GRID, ray=cluster.address, on_cell=lose_a_node)
    assert records(there.path) == records(alone.path)
    assert len(seen) == len(records(alone.path)) - 1 == 16
    assert (there.path / "index.html").exists() and len(there.failed) == len(alone.failed) > 0


def test_no_cluster_there(tmp_path: Path) -> None:
    with pytest.raises(SpinfoldError, match="no Ray cluster"), connected("127.0.0.1:1"):
        pass
