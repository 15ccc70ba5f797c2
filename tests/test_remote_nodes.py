"""Every node has the driver's versions and sees its folders, or the run ends before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from dcq_ray.errors import ClusterError
from dcq_ray.remote.nodes import ask_nodes, check_shared, refuse_other_versions, refuse_unseen, unseen, versions
from dcq_ray.storage import open_store


def test_nodes_that_see_everything_are_no_problem() -> None:
    refuse_unseen({"a (10.0.0.1)": {}, "b (10.0.0.2)": {}})
    refuse_unseen({})


def test_a_node_that_does_not_see_a_folder_is_named_with_the_folder_and_what_to_do() -> None:
    with pytest.raises(ClusterError) as caught:
        refuse_unseen({"a (10.0.0.1)": {}, "b (10.0.0.2)": {"/data/run": "not seen"}})
    assert str(caught.value) == (
        "1 of the cluster's 2 nodes do not see storage.run_dir or storage.cache_dir as the driver does: node b (10.0.0.2): "
        "/data/run (not seen); name a URI that all nodes reach (such as s3://bucket/runs), or a folder that is mounted on "
        "all of them"
    )


def test_a_token_is_seen_only_where_it_was_written(tmp_path: Path, s3_uri: str) -> None:
    one, other, remote = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "other")), open_store(s3_uri)
    for store in (one, remote):
        store.write_bytes(".seen-1", b".seen-1")
    other.write_bytes(".seen-1", b"of another driver")
    nowhere = str(tmp_path / "nowhere")
    found = unseen((one.uri, other.uri, remote.uri, nowhere), ".seen-1")
    assert set(found) == {other.uri, nowhere}
    (tmp_path / "file").write_text("")
    assert "a file stands where a folder" in unseen((str(tmp_path / "file"),), ".seen-1")[str(tmp_path / "file")]


def test_a_node_of_another_version_is_named_with_what_differs() -> None:
    same = versions()
    refuse_other_versions({"a (10.0.0.1)": same, "b (10.0.0.2)": {}})
    with pytest.raises(ClusterError) as caught:
        refuse_other_versions({"a (10.0.0.1)": same, "b (10.0.0.2)": {**same, "torch": "1.0"}})
    assert str(caught.value) == (
        "1 of the cluster's 2 nodes have other versions than the driver: node b (10.0.0.2): torch 1.0 (driver: "
        f"{same['torch']}); install the same on all nodes, since the student depends on them"
    )


def fail(why: str) -> dict[str, str]:
    raise AssertionError(why)


@pytest.fixture
def two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_all_nodes_of_a_cluster_are_asked(two_nodes: None, tmp_path: Path, s3_uri: str) -> None:
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    check_shared((run, cache, s3_uri))
    assert open_store(run).tree() == open_store(cache).tree() == open_store(s3_uri).tree() == ()
    nodes = {node["NodeID"]: node["NodeID"] for node in ray.nodes()}
    # A token that nobody wrote stands for a folder that only the driver sees.
    answers = ask_nodes(nodes, unseen, (run,), ".seen-never", late=fail, broken=fail)
    assert answers == {node: {run: "what the driver writes there is not seen"} for node in nodes}
    with pytest.raises(ClusterError, match="2 of the cluster's 2 nodes do not see"):
        refuse_unseen(answers)
    # Workers do not find this module, as those of a node do not that lacks the package.
    broken = ask_nodes(nodes, fail, "never", late=fail, broken=lambda why: {"told": why})
    assert {why["told"] for why in broken.values()} == {f"ModuleNotFoundError: No module named {__name__!r}"}
    assert len(broken) == 2
