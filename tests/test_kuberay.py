"""The Kubernetes files: KubeRay's own schemas, with no unknown field, and what they promise of secrets, users and resuming."""

from __future__ import annotations

import copy
import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from dcq_ray.cli import cli
from dcq_ray.version import __version__

FOLDER = Path(__file__).parents[1] / "cluster" / "kuberay"
RAY_FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayCronJob": "raycronjob.yaml"}
ALL_FILES = (*RAY_FILES.values(), "cronjob.yaml", "pvc.yaml")


def document(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@functools.cache
def schema_of(kind: str) -> Any:
    """The schema that the operator's CRD gives for a kind; skips where the CRDs are missing."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("DCQ_DATA") or default) / "kuberay-crds" / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs not found: {path} (name the folder that holds kuberay-crds in DCQ_DATA)")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(path.read_text(), Loader=loader)
    return next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A default may be any value; only schemas are looked into.
    closed = {key: value if key == "default" else strict(value) for key, value in schema.items()}
    fields = schema.get("properties")
    names_fields = isinstance(fields, dict) and schema.get("type") == "object"
    if names_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def mistakes(instance: Any, schema: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(strict(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(instance)]


def pod_schema() -> Any:
    head = schema_of("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]
    return head["properties"]["template"]


def cluster_specs() -> dict[str, Any]:
    return {
        "raycluster.yaml": document("raycluster.yaml")["spec"],
        "rayjob.yaml": document("rayjob.yaml")["spec"]["rayClusterSpec"],
        "raycronjob.yaml": document("raycronjob.yaml")["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def job_specs() -> dict[str, Any]:
    return {
        "rayjob.yaml": document("rayjob.yaml")["spec"],
        "raycronjob.yaml": document("raycronjob.yaml")["spec"]["jobTemplate"],
    }


def pods() -> Iterator[tuple[str, Any]]:
    """Every pod template, and whose it is."""
    for name, spec in cluster_specs().items():
        yield f"{name} head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]
    for name, spec in job_specs().items():
        yield f"{name} submitter", spec["submitterPodTemplate"]
    yield "cronjob.yaml", document("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]


def command_lines() -> dict[str, list[str]]:
    lines = {name: shlex.split(spec["entrypoint"]) for name, spec in job_specs().items()}
    template = document("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    return {**lines, "cronjob.yaml": template["spec"]["containers"][0]["command"]}


def parsed(arguments: list[str]) -> Mapping[str, Any]:
    """What the real command line understands, without running it."""
    assert arguments[0] == "dcq-ray"
    context = cli.make_context("dcq-ray", arguments[1:])
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    return command.make_context(name, rest, parent=context).params


@pytest.mark.parametrize(("kind", "name"), RAY_FILES.items())
def test_kuberays_schema_takes_every_field(kind: str, name: str) -> None:
    content = document(name)
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", kind)
    assert mistakes(content, schema_of(kind)) == []


def test_a_misspelt_field_a_wrong_type_and_a_missing_field_are_found() -> None:
    schema = schema_of("RayCluster")
    content = document("raycluster.yaml")
    wrong = copy.deepcopy(content)
    container = wrong["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["imagePulPolicy"] = "Always"
    assert ["imagePulPolicy" in found for found in mistakes(wrong, schema)] == [True]
    wrong = copy.deepcopy(content)
    wrong["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "eight"
    assert ["'eight'" in found for found in mistakes(wrong, schema)] == [True]
    wrong = copy.deepcopy(content)
    del wrong["spec"]["headGroupSpec"]
    assert ["headGroupSpec" in found for found in mistakes(wrong, schema)] == [True]


def test_quantities_may_be_whole_numbers_or_texts_and_labels_are_free() -> None:
    template = copy.deepcopy(document("raycluster.yaml")["spec"]["headGroupSpec"]["template"])
    template["metadata"] = {"labels": {"any": "label"}}
    for quantity, right in ((2, True), ("2", True), ("1500m", True), ("two", False)):
        template["spec"]["containers"][0]["resources"]["limits"]["cpu"] = quantity
        assert (mistakes(template, pod_schema()) == []) is right, quantity


def test_the_pods_of_the_plain_cronjob_are_pods() -> None:
    content = document("cronjob.yaml")
    assert (content["apiVersion"], content["kind"]) == ("batch/v1", "CronJob")
    assert mistakes(content["spec"]["jobTemplate"]["spec"]["template"], pod_schema()) == []


def test_the_plain_cronjob_and_the_claim_have_only_fields_that_exist() -> None:
    spec = document("cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert set(spec) <= {
        "schedule",
        "timeZone",
        "concurrencyPolicy",
        "startingDeadlineSeconds",
        "successfulJobsHistoryLimit",
        "failedJobsHistoryLimit",
        "suspend",
        "jobTemplate",
    }
    job = {"backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "completions", "parallelism", "template"}
    assert set(spec["jobTemplate"]["spec"]) <= job
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    claim = document("pvc.yaml")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "cronjob.yaml"])
def test_the_real_command_line_takes_their_commands(name: str) -> None:
    arguments = command_lines()[name]
    params = parsed(arguments)
    assert params["job_path"] == "/jobs/job.yaml"
    # What outlives a pod lies on the claim, the cache too.
    assert params["run_dir"].startswith("/runs/")
    assert params["overrides"] == ("storage.cache_dir=/runs/cache",)
    # A try that starts over would never end.
    assert not params.get("fresh", False)
    with pytest.raises(click.UsageError, match="--run-dri"):
        parsed([*arguments, "--run-dri", "/runs/x"])


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_job_resumes_ends_and_leaves_no_cluster(name: str) -> None:
    spec = job_specs()[name]
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["replicas"] <= group["maxReplicas"]


def test_the_three_clusters_are_one_but_for_the_worker_that_stays() -> None:
    first, *others = cluster_specs().values()
    assert first["authOptions"] == {"mode": "token"}
    (group,) = first["workerGroupSpecs"]
    assert group.pop("minReplicas") == 1
    for other in others:
        other["workerGroupSpecs"][0].pop("minReplicas")
        assert other == first


@pytest.mark.parametrize(("whose", "template"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_pod_runs_without_privileges_within_limits_from_a_pinned_image(whose: str, template: Any) -> None:
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000, "the image's user"
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    named = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["image"].rpartition(":")[2] in (f"{__version__}-cpu", f"{__version__}-cuda")
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= named


def test_what_ends_waits_for_checkpoints_within_its_grace() -> None:
    for name, spec in cluster_specs().items():
        for template in (spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])):
            (container,) = template["spec"]["containers"]
            # The run saves within 10 s of its SIGTERM, and is given 15.
            assert "15" in " ".join(container["lifecycle"]["preStop"]["exec"]["command"]), name
            assert template["spec"]["terminationGracePeriodSeconds"] >= 30, name


def test_no_secret_lies_in_the_files() -> None:
    for name in ALL_FILES:
        assert document(name)["kind"] != "Secret"
    for whose, template in pods():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                sensitive = any(word in variable["name"] for word in ("TOKEN", "KEY", "PASSWORD", "SECRET"))
                assert not (sensitive and "value" in variable), f"{whose}: {variable['name']}"


def test_the_readme_names_the_files_that_exist() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in ALL_FILES:
        assert name in text
