"""Ports, probes, environment and flags in deploy/ are those of the code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from coordinator.config import CoordinatorConfig, coordinator_config
from coordinator.engine import _DRAIN_MARGIN_S
from coordinator.frontend.health import HealthService
from lockstep import cli, health, serve, workers
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.serve import group_spec, serve_config
from lockstep.workers import workers_config
from tests.helpers.manifests import OVERLAYS, Pod, manifests, pods, pods_with
from worker.config import worker_config

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
SYSTEMD = DEPLOY / "systemd"
CONTAINERS = [(pod, container) for pod in pods() for container in pod.spec["containers"]]
NUM_LOCAL_RANKS = 2
WORKER_PROBES = {"", "liveness"}


def container_id(value: object) -> str:
    return value.origin if isinstance(value, Pod) else ""


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host as the manifests want it."""
    for module in (serve, workers):
        monkeypatch.setattr(module, "count_gpus", lambda environ: NUM_LOCAL_RANKS)


def settings_of(words: Sequence[str], environ: Mapping[str, str]) -> dict[str, int | str]:
    """Ports and addresses that a `lockstep` command line stands for; FlagError if it is wrong."""
    command, *flags = words
    if command == "coordinator":
        one = coordinator_config(flags, environ)
        return {"grpc": one.port, "metrics": one.metrics_port, "host": one.host}
    if command == "worker":
        rank = worker_config(flags, environ)
        return {"grpc": rank.port, "metrics": rank.metrics_port, "host": rank.host}
    if command == "workers":
        host = workers_config(flags, environ)
        return {"grpc": host.port, "metrics": host.metrics_port, "host": host.host}
    assert command == "serve", command
    config = serve_config(flags, environ)
    group = group_spec(config, Path("/m"), {})
    # What it passes on is checked by those who get it.
    passed = coordinator_config(group.coordinator_command(["h:1"], 50051, 9851, "")[4:], {})
    worker_config(group.worker_command(0, 50100, 9860, "")[4:], {})
    return {"grpc": config.port, "metrics": config.metrics_port, "host": passed.host}


@pytest.mark.parametrize(("pod", "container"), CONTAINERS, ids=container_id)
def test_a_container_is_started_with_flags_and_environment_that_its_daemon_takes(
    pod: Pod, container: dict[str, Any]
) -> None:
    words = [re.sub(r"\$\(LEADER\)", "lockstep-group-0", word) for word in container["args"]]
    environ = pod.environ(container)
    found = settings_of(words, environ)
    assert found["host"] == "0.0.0.0", "the kubelet's probes come to the pod's address"
    for planted in ([*words, "--no-such-flag=1"], words):
        wrong = environ | ({"LOCKSTEP_NO_SUCH": "1"} if planted is words else {})
        with pytest.raises(FlagError, match=r"no-such-flag|LOCKSTEP_NO_SUCH"):
            settings_of(planted, wrong)
    assert words[0] in cli._COMMANDS or words[0] in cli._DAEMONS


@pytest.mark.parametrize(("pod", "container"), CONTAINERS, ids=container_id)
def test_ports_and_probes_of_a_container_are_those_of_its_daemon(
    pod: Pod, container: dict[str, Any]
) -> None:
    words = [re.sub(r"\$\(LEADER\)", "lockstep-group-0", word) for word in container["args"]]
    found = settings_of(words, pod.environ(container))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    is_public = words[0] != "workers"
    assert ports["grpc" if is_public else "grpc-rank0"] == found["grpc"]
    assert ports["metrics" if is_public else "metrics-rank0"] == found["metrics"]
    if words[0] == "serve":
        config = serve_config(words[1:], pod.environ(container))
        base = config.worker_metrics_port(0)
        ranks = {f"metrics-rank{rank}": base + rank for rank in range(config.num_ranks)}
        assert ranks.items() <= ports.items()
    if words[0] == "workers":
        num_ranks = len(workers_config(words[1:], pod.environ(container)).devices)
        assert num_ranks == container["resources"]["limits"]["nvidia.com/gpu"]
        assert ports["metrics-rank1"] == ports["metrics-rank0"] + 1
    known = set(HealthService()._statuses) if is_public else WORKER_PROBES
    probes = {name: container[name]["grpc"] for name in container if name.endswith("Probe")}
    assert {"startupProbe", "livenessProbe"} <= probes.keys()
    for probe in probes.values():
        assert probe["port"] == found["grpc"]
        assert probe["service"] in known
    assert probes["livenessProbe"]["service"] == "liveness"
    assert probes.get("readinessProbe", {"service": "readiness"})["service"] == "readiness"


@pytest.mark.parametrize(("pod", "container"), CONTAINERS, ids=container_id)
def test_a_pod_lives_long_enough_to_drain(pod: Pod, container: dict[str, Any]) -> None:
    words = [re.sub(r"\$\(LEADER\)", "lockstep-group-0", word) for word in container["args"]]
    environ = pod.environ(container)
    pause = container.get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})["preStop"]["sleep"]
    if words[0] == "coordinator":
        config = coordinator_config(words[1:], environ)
        takes = config.withdrawal_seconds + config.drain_seconds + _DRAIN_MARGIN_S
    elif words[0] == "serve":
        group = group_spec(serve_config(words[1:], environ), Path("/m"), {})
        takes = group.drain_timeout_s + group.worker_stop_timeout_s
    else:
        takes = workers._STOP_LIMIT_S
    assert pause["seconds"] + takes < pod.spec["terminationGracePeriodSeconds"]


def test_ranks_of_a_leader_outlive_the_drain_beside_them() -> None:
    for pod in pods():
        if "LeaderWorkerSet" in pod.origin:
            (ranks,) = [c for c in pod.spec["containers"] if c["name"] == "workers"]
            config = float(pod.settings["LOCKSTEP_DRAIN_SECONDS"])
            assert (
                ranks["lifecycle"]["preStop"]["sleep"]["seconds"] >= 15 + config + _DRAIN_MARGIN_S
            )


@pytest.mark.parametrize("overlay", ["several-hosts", "leaderworkerset"])
def test_the_workers_that_a_coordinator_dials_are_those_that_are_started(overlay: str) -> None:
    ours = [(p, c) for p, c in CONTAINERS if p.origin.startswith(f"overlays/{overlay}/")]
    (pod, container) = next((p, c) for p, c in ours if c["args"][0] == "coordinator")
    words = [re.sub(r"\$\(LEADER\)", "lockstep-group-0", word) for word in container["args"]]
    dialled = coordinator_config(words[1:], pod.environ(container)).workers
    hosts, ranks = [], next(c for _, c in ours if c["args"][0] == "workers")
    if overlay == "several-hosts":
        item = manifests()["overlays/several-hosts/workers.yaml StatefulSet/lockstep-workers"]
        name, service = item["metadata"]["name"], item["spec"]["serviceName"]
        hosts = [f"{name}-{index}.{service}" for index in range(item["spec"]["replicas"])]
    else:
        item = manifests()[
            "overlays/leaderworkerset/leaderworkerset.yaml LeaderWorkerSet/lockstep-group"
        ]
        name, size = item["metadata"]["name"], item["spec"]["leaderWorkerTemplate"]["size"]
        hosts = [f"{name}-0.{name}", *(f"{name}-0-{i}.{name}" for i in range(1, size))]
    config = workers_config(ranks["args"][1:], pod.settings)
    assert list(dialled) == [
        f"{host}:{config.port + index}" for host in hosts for index in range(len(config.devices))
    ]


def unit(name: str) -> dict[str, list[str]]:
    """Values of every key of a unit file, in order; sections are not told apart."""
    found: dict[str, list[str]] = {}
    for line in (SYSTEMD / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def unit_command(name: str, instance: str = "0") -> tuple[list[str], dict[str, str]]:
    """Words after `lockstep` and the environment, as systemd would expand them."""
    given = unit(name)
    lines = [value.replace("%i", instance) for value in given.get("Environment", [])]
    lines += (SYSTEMD / "lockstep.env").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    environ = {key: value for key, value in pairs}
    text = given["ExecStart"][0].replace("%i", instance)
    words = shlex.split(re.sub(r"\$\{(\w+)\}", lambda match: environ[match[1]], text))
    assert words[0] == "/opt/lockstep/bin/lockstep"
    return words[1:], environ


@pytest.mark.parametrize("rank", range(10))
def test_a_workers_unit_serves_where_the_coordinator_dials(rank: int) -> None:
    words, environ = unit_command("lockstep-worker@.service", str(rank))
    config = worker_config(words[1:], environ)
    assert (words[0], config.device) == ("worker", f"cuda:{rank}")
    assert (config.port, config.metrics_port) == (50100 + rank, 9860 + rank)
    words, environ = unit_command("lockstep-coordinator.service")
    dialled = coordinator_config(words[1:], environ).workers
    if rank < len(dialled):
        assert dialled[rank] == f"{config.host}:{config.port}"


def test_the_units_limits_fit_the_settings() -> None:
    words, environ = unit_command("lockstep-coordinator.service")
    config: CoordinatorConfig = coordinator_config(words[1:], environ)
    given = {key: values[0] for key, values in unit("lockstep-coordinator.service").items()}
    assert float(given["TimeoutStartSec"]) > config.startup_timeout
    takes = config.withdrawal_seconds + config.drain_seconds + 2 * _DRAIN_MARGIN_S
    assert float(given["TimeoutStopSec"]) > takes
    assert float(given["WatchdogSec"]) > config.step_timeout
    worker = {key: values[0] for key, values in unit("lockstep-worker@.service").items()}
    assert float(worker["WatchdogSec"]) > config.step_timeout
    assert worker["Before"] == "lockstep-coordinator.service"
    assert given["Type"] == worker["Type"] == "notify"


def test_a_setting_that_does_not_exist_in_the_environment_file_would_be_noticed() -> None:
    words, environ = unit_command("lockstep-coordinator.service")
    with pytest.raises(FlagError, match="LOCKSTEP_PORTS"):
        coordinator_config(words[1:], environ | {"LOCKSTEP_PORTS": "1"})


def image(name: str) -> dict[str, str]:
    text = (DEPLOY / "images" / f"{name}.Dockerfile").read_text().replace("\\\n", "")
    last = text.rpartition("\nFROM ")[2]
    return dict(re.findall(r"^(?:HEALTHCHECK.* )?(CMD|ENTRYPOINT|EXPOSE|USER) +(.*)$", last, re.M))


@pytest.mark.parametrize(("name", "command"), [("coordinator", "coordinator"), ("worker", "serve")])
def test_an_image_starts_a_command_and_asks_a_probe_that_exist(name: str, command: str) -> None:
    found = image(name)
    assert json.loads(found["ENTRYPOINT"]) == ["lockstep"]
    assert json.loads(found["CMD"]) == [command]
    defaults = CoordinatorConfig(Path("m"), "m", ("h:1",))
    assert found["EXPOSE"].split() == [str(defaults.port), str(defaults.metrics_port)]
    user = {str(pod.spec["securityContext"]["runAsUser"]) for pod in pods()}
    assert {found["USER"].partition(":")[0]} == user
    text = (DEPLOY / "images" / f"{name}.Dockerfile").read_text()
    probe = json.loads(re.findall(r"^ +CMD (\[.*\])$", text, re.M)[0])
    assert probe[:2] == ["lockstep", "health"]
    assert health.main([*probe[2:], "--address", "127.0.0.1:1", "--timeout", "1"]) == 1
    assert probe[probe.index("--service") + 1] in HealthService()._statuses


def test_prometheus_scrapes_the_ports_that_the_units_serve() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    words, environ = unit_command("lockstep-coordinator.service")
    coordinator = coordinator_config(words[1:], environ)
    assert targets["lockstep-coordinator"] == [f"127.0.0.1:{coordinator.metrics_port}"]
    for rank, target in enumerate(targets["lockstep-worker"]):
        words, environ = unit_command("lockstep-worker@.service", str(rank))
        assert target == f"127.0.0.1:{worker_config(words[1:], environ).metrics_port}"
    assert len(targets["lockstep-worker"]) == coordinator.world_size


SECURE = [
    ("one-host", ("tls",)),
    ("one-host", ("tls", "api-keys")),
    ("several-hosts", ("tls", "api-keys", "group-tls")),
    ("several-hosts", ("group-tls",)),
    ("leaderworkerset", ("tls", "api-keys", "group-tls")),
]


def command_config(words: Sequence[str], environ: Mapping[str, str]) -> Any:
    """The settings of a container's daemon; of `serve` those of its coordinator."""
    command, *flags = words
    if command == "workers":
        ours = workers_config(flags, environ)
        (first, *_) = ours.commands("/m").values()
        return worker_config(first[4:], {})
    if command == "serve":
        group = group_spec(serve_config(flags, environ), Path("/m"), {})
        return coordinator_config(group.coordinator_command(["h:1"], 50051, 9851, "")[4:], {})
    return coordinator_config(flags, environ)


@pytest.mark.parametrize(("overlay", "components"), SECURE)
def test_components_give_daemons_files_that_are_mounted(
    overlay: str, components: tuple[str, ...]
) -> None:
    for pod in pods_with(overlay, *components):
        volumes = {volume["name"] for volume in pod.spec["volumes"]}
        for container in pod.spec["containers"]:
            words = [re.sub(r"\$\(LEADER\)", "group-0", word) for word in container["args"]]
            config = command_config(words, pod.environ(container))
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            is_public = words[0] != "workers"
            has_tls = "tls" in components if is_public else "group-tls" in components
            assert config.allow_plaintext is not has_tls
            files = [config.group_cert, config.group_key, config.group_ca, config.group_secret]
            assert all(bool(file) == ("group-tls" in components) for file in files)
            if is_public:
                assert bool(config.tls_cert) == bool(config.tls_key) == ("tls" in components)
                assert bool(config.api_keys) == ("api-keys" in components)
                files += [config.tls_cert, config.tls_key, config.api_keys]
            assert all(str(Path(file).parent) in mounts for file in files if file)


@pytest.mark.parametrize(("overlay", "components"), SECURE)
def test_probes_of_a_port_with_tls_are_commands_that_speak_it(
    overlay: str, components: tuple[str, ...]
) -> None:
    for pod in pods_with(overlay, *components):
        for container in pod.spec["containers"]:
            is_public = container["args"][0] != "workers"
            has_tls = ("tls" if is_public else "group-tls") in components
            port = 50051 if is_public else 50100
            folder = "/etc/lockstep/tls" if is_public else "/etc/lockstep/group"
            probes = [container[name] for name in container if name.endswith("Probe")]
            assert all(("exec" in probe) is has_tls for probe in probes)
            for probe in probes if has_tls else []:
                words = probe["exec"]["command"]
                assert words[:2] == ["lockstep", "health"]
                assert f"--address=127.0.0.1:{port}" in words
                assert f"--tls-ca={folder}/ca.crt" in words
                assert (f"--tls-key={folder}/tls.key" in words) is not is_public
                # Parsed, and stopped by the files that are not here.
                assert health.main(words[2:]) == ExitCode.CONFIG
                service = words[2].partition("=")[2]
                assert service in (set(HealthService()._statuses) if is_public else WORKER_PROBES)


@pytest.mark.parametrize(("overlay", "components"), SECURE)
def test_a_pod_with_components_fits_the_schema(overlay: str, components: tuple[str, ...]) -> None:
    for pod in pods_with(overlay, *components):
        metadata = {"name": "any", "labels": pod.labels}
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}
        kubernetes_validate.validate(item, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_its_explicit_word_an_overlay_would_not_serve_in_the_clear(overlay: str) -> None:
    for pod in pods_with(overlay):
        for container in pod.spec["containers"]:
            words = [re.sub(r"\$\(LEADER\)", "group-0", word) for word in container["args"]]
            environ = pod.environ(container)
            del environ["LOCKSTEP_ALLOW_PLAINTEXT"]
            with pytest.raises(FlagError, match="--allow-plaintext"):
                command_config(words, environ)


def test_what_the_environment_file_comments_out_are_settings() -> None:
    words, environ = unit_command("lockstep-coordinator.service")
    text = (SYSTEMD / "lockstep.env").read_text()
    offered = dict(re.findall(r"^#(LOCKSTEP_\w+)=(.*)$", text, re.M))
    assert {"LOCKSTEP_TLS_CERT", "LOCKSTEP_API_KEYS", "LOCKSTEP_GROUP_SECRET"} <= offered.keys()
    config = coordinator_config(words[1:], environ | offered)
    assert config.tls_cert and config.group_ca
    words, environ = unit_command("lockstep-worker@.service")
    assert worker_config(words[1:], environ | offered).group_secret == config.group_secret
