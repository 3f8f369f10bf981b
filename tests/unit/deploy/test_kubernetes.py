"""The manifests are what the Kubernetes API takes, and hold what an operator counts on."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.helpers.manifests import KUBERNETES, OVERLAYS, Pod, documents, manifests, pods

# preStop's sleep needs the first, the last is the newest schema that the package carries.
VERSIONS = ("1.30", "1.37")
CUSTOM = ("PodMonitor", "PrometheusRule", "LeaderWorkerSet")
NATIVE = {name: item for name, item in manifests().items() if item["kind"] not in CUSTOM}
PODS = pods()


def validate(item: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_a_manifest_fits_the_schema_of_its_kind(name: str, version: str) -> None:
    validate(NATIVE[name], version)


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.origin)
def test_a_pod_template_fits_the_schema_whatever_kind_holds_it(pod: Pod) -> None:
    metadata = {"name": "any", "labels": pod.labels}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}
    validate(item, VERSIONS[-1])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "containers", 0, "livenessProbe", "grpc"), {"service": "x"}),
        (("spec", "template", "spec", "terminationGracePeriodSecond"), 1),
        (("spec", "replicas"), "two"),
    ],
)
def test_a_planted_mistake_does_not_fit(path: tuple[Any, ...], value: object) -> None:
    item = copy.deepcopy(NATIVE["overlays/one-host/deployment.yaml Deployment/lockstep"])
    validate(item, VERSIONS[-1])
    *above, last = path
    place = item
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(item, VERSIONS[-1])


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("kustomization.yaml")), ids=str)
def test_a_kustomization_lists_every_file_beside_it_and_no_other(path: Path) -> None:
    (content,) = documents(path)
    resources = content.get("resources", [])
    listed = {name for name in resources if not name.startswith("..")}
    assert listed == {item.name for item in path.parent.glob("*.yaml")} - {path.name}
    for name in resources:
        assert (path.parent / name).exists(), name
    for generator in content.get("configMapGenerator", []):
        assert all((path.parent / name).is_file() for name in generator["envs"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_names_every_image_that_it_runs(overlay: str) -> None:
    (content,) = documents(KUBERNETES / "overlays" / overlay / "kustomization.yaml")
    named = {image["name"] for image in content["images"]}
    run = {
        container["image"]
        for pod in PODS
        if pod.origin.startswith(f"overlays/{overlay}/")
        for container in pod.spec["containers"]
    }
    assert run <= named


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.origin)
def test_a_pod_is_confined_and_its_ranks_have_gpus_and_shared_memory(pod: Pod) -> None:
    assert pod.spec["securityContext"]["runAsNonRoot"] is True
    assert pod.spec["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for container in pod.spec["containers"]:
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"] is True
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounted
        if container["image"] == "lockstep-worker":
            assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
            assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_prometheus_rule_is_what_promtool_tests() -> None:
    module = runpy.run_path(str(KUBERNETES.parent / "prometheus_rule.py"))
    written = yaml.safe_load(Path(module["TARGET"]).read_text())
    assert written == module["prometheus_rule"]()


def test_every_pod_is_behind_the_network_policy_and_the_disruption_budget() -> None:
    base = manifests()
    policy = base["base/networkpolicy.yaml NetworkPolicy/lockstep"]["spec"]["podSelector"]
    budget = base["base/poddisruptionbudget.yaml PodDisruptionBudget/lockstep"]["spec"]["selector"]
    for selector in (policy["matchLabels"], budget["matchLabels"]):
        assert all(selector.items() <= pod.labels.items() for pod in PODS)


def test_the_service_leads_to_every_pod_with_a_public_port_and_to_no_other() -> None:
    service = manifests()["base/service.yaml Service/lockstep"]["spec"]
    for pod in PODS:
        ports = {port["name"] for item in pod.spec["containers"] for port in item["ports"]}
        is_selected = service["selector"].items() <= pod.labels.items()
        assert is_selected == (service["ports"][0]["targetPort"] in ports), pod.origin


def test_the_pod_monitor_and_the_autoscaler_name_what_exists() -> None:
    found = manifests()
    monitor = found["components/prometheus-operator/podmonitor.yaml PodMonitor/lockstep"]["spec"]
    endpoints = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for pod in PODS:
        assert monitor["selector"]["matchLabels"].items() <= pod.labels.items()
        ports = {port["name"] for item in pod.spec["containers"] for port in item["ports"]}
        assert {name for name in ports if name.startswith("metrics")} <= endpoints
    scaler = "components/autoscaling/horizontalpodautoscaler.yaml HorizontalPodAutoscaler/lockstep"
    target = found[scaler]["spec"]["scaleTargetRef"]
    assert f"overlays/one-host/deployment.yaml {target['kind']}/{target['name']}" in found
