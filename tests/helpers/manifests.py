"""The Kubernetes manifests of deploy/, read for tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("one-host", "several-hosts", "leaderworkerset")


@dataclass(frozen=True)
class Pod:
    """A pod template: where it is from and its spec, with the settings of its ConfigMap."""

    origin: str
    labels: dict[str, str]
    spec: dict[str, Any]
    settings: dict[str, str]

    def environ(self, container: dict[str, Any]) -> dict[str, str]:
        """What the container's process finds in its environment."""
        given = {item["name"]: item.get("value", "<from the pod>") for item in container["env"]}
        return self.settings | given


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> dict[str, dict[str, Any]]:
    """Every resource by "path kind/name", but for kustomizations."""
    return {
        f"{path.relative_to(KUBERNETES)} {item['kind']}/{item['metadata']['name']}": item
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        if path.name != "kustomization.yaml"
        for item in documents(path)
    }


def settings(overlay: str) -> dict[str, str]:
    """The environment of an overlay's ConfigMap."""
    lines = (KUBERNETES / "overlays" / overlay / "lockstep.env").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {name: value for name, value in pairs}


def pods() -> list[Pod]:
    """Every pod template of every overlay."""
    return [pod for name, item in manifests().items() for pod in _pods_of(name, item)]


def pods_with(overlay: str, *components: str) -> list[Pod]:
    """The pod templates of an overlay that has these components, patched as kustomize does it."""
    found = []
    for name, item in manifests().items():
        if name.startswith(f"overlays/{overlay}/"):
            patched = copy.deepcopy(item)
            for component in components:
                _apply(component, patched)
            found += _pods_of(name, patched)
    return found


def _pods_of(name: str, item: dict[str, Any]) -> list[Pod]:
    found = settings(name.split("/")[1]) if name.startswith("overlays/") else {}
    return [
        Pod(name, template["metadata"]["labels"], template["spec"], found)
        for template in _templates(item)
    ]


def _apply(component: str, item: dict[str, Any]) -> None:
    (content,) = documents(KUBERNETES / "components" / component / "kustomization.yaml")
    for entry in content["patches"]:
        target = entry["target"]
        if target["kind"] == item["kind"] and target.get("name") in (
            None,
            item["metadata"]["name"],
        ):
            for operation in yaml.safe_load(entry["patch"]):
                _patch(item, operation)


def _patch(item: dict[str, Any], operation: dict[str, Any]) -> None:
    """RFC 6902's `add` at the end of a list, and `replace`; KeyError where there is nothing."""
    *above, last = operation["path"].strip("/").split("/")
    place: Any = item
    for key in above:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if operation["op"] == "add" and last == "-":
        place.append(operation["value"])
    else:
        assert operation["op"] == "replace"
        _ = place[last]
        place[last] = operation["value"]


def _templates(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if item["kind"] in ("Deployment", "StatefulSet"):
        yield item["spec"]["template"]
    elif item["kind"] == "LeaderWorkerSet":
        yield item["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        yield item["spec"]["leaderWorkerTemplate"]["workerTemplate"]
