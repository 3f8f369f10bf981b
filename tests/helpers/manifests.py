"""The Kubernetes manifests of deploy/, read for tests."""

from __future__ import annotations

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
    found = []
    for name, item in manifests().items():
        for template in _templates(item):
            overlay = name.split("/")[1]
            labels = template["metadata"]["labels"]
            found.append(Pod(name, labels, template["spec"], settings(overlay)))
    return found


def _templates(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if item["kind"] in ("Deployment", "StatefulSet"):
        yield item["spec"]["template"]
    elif item["kind"] == "LeaderWorkerSet":
        yield item["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        yield item["spec"]["leaderWorkerTemplate"]["workerTemplate"]
