"""Writes the PrometheusRule of the Kubernetes component from the rule files that promtool tests.

python deploy/prometheus_rule.py; a test holds the written file to this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_DEPLOY = Path(__file__).resolve().parent
SOURCES = ("recording.rules.yml", "alerting.rules.yml")
TARGET = _DEPLOY / "kubernetes/components/prometheus-operator/prometheusrule.yaml"


def prometheus_rule() -> dict[str, Any]:
    """The custom resource with every group of the rule files."""
    groups = []
    for name in SOURCES:
        groups += yaml.safe_load((_DEPLOY / "prometheus" / name).read_text())["groups"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "lockstep"},
        "spec": {"groups": groups},
    }


if __name__ == "__main__":
    text = yaml.safe_dump(prometheus_rule(), sort_keys=False, width=100)
    TARGET.write_text(f"# Written by deploy/prometheus_rule.py from deploy/prometheus.\n{text}")
