"""deploy/kubernetes is valid by the published schemas, and says what the settings, commands and routes of bASIC are."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from ruamel.yaml import YAML

from jobs.api.routes import metrics, service
from jobs.local.redis_server import SERVER_OPTIONS
from jobs.messages import model_name
from jobs.settings import settings_classes
from tests.commands import parse
from tests.kustomize import Manifest, containers, pod, render
from tests.paths import ROOT

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ["gpu", "gpu-scaled", "cpu-trial"]
SCHEMAS = resources.files("kubernetes_validate") / "kubernetes-json-schema/v1.37.0-local-strict"

# KEDA's own resources, by the fields that its reference documents.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
TRIGGER = {
    "type": "object",
    "required": ["type", "metadata"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "postgresql"},
        "metadata": {
            **TEXTS,
            "required": ["query", "targetQueryValue"],
            "propertyNames": {"enum": ["query", "targetQueryValue", "activationTargetQueryValue"]},
        },
        "name": {"type": "string"},
        "metricType": {"enum": ["AverageValue", "Value"]},
        "authenticationRef": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    },
}
KEDA: dict[str, Any] = {
    "ScaledObject": {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {"type": "object", "required": ["name"], "additionalProperties": {"type": "string"}},
            "pollingInterval": COUNT,
            "cooldownPeriod": COUNT,
            "minReplicaCount": COUNT,
            "maxReplicaCount": COUNT,
            "advanced": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"horizontalPodAutoscalerConfig": {"required": ["behavior"]}},
            },
            "triggers": {"type": "array", "items": TRIGGER},
        },
    },
    "TriggerAuthentication": {
        "type": "object",
        "required": ["secretTargetRef"],
        "additionalProperties": False,
        "properties": {
            "secretTargetRef": {"items": {**TEXTS, "required": ["parameter", "name", "key"]}},
        },
    },
}


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Manifest]]:
    return {name: render(FOLDER / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def manifests(overlays: Mapping[str, list[Manifest]]) -> list[Manifest]:
    return [manifest for overlay in overlays.values() for manifest in overlay]


def ours(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Yield every container that runs our code, with its manifest."""
    for manifest in manifests:
        for container in containers(manifest):
            if manifest["metadata"]["name"].startswith("basic-"):
                yield manifest, container


def only(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def test_every_manifest_is_valid_by_the_published_schema_of_its_kind(manifests: list[Manifest]) -> None:
    definitions = Resource.from_contents(json.loads((SCHEMAS / "_definitions.json").read_text()))
    registry: Registry[Any] = definitions @ Registry()
    for manifest in {json.dumps(manifest, sort_keys=True): manifest for manifest in manifests}.values():
        version, kind = manifest["apiVersion"], manifest["kind"]
        if version == "keda.sh/v1alpha1":
            jsonschema.validate(manifest["spec"], KEDA[kind])
            continue
        group, _, number = version.rpartition("/")
        name = "-".join(word for word in (kind.lower(), group.partition(".")[0], number) if word)
        schema = json.loads((SCHEMAS / f"{name}.json").read_text())
        jsonschema.validators.Draft202012Validator(schema, registry=registry).validate(manifest)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", ["gpu-scaled", "cpu-trial"])  # the first has `gpu` inside
def test_kubectl_prints_the_manifests_that_these_tests_check(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "No such file" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr

    def in_order(found: list[Manifest]) -> list[Manifest]:
        return sorted(found, key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))

    assert in_order(list(YAML(typ="safe").load_all(done.stdout))) == in_order(render(FOLDER / overlay))


def test_nothing_runs_as_root_with_a_privilege_or_on_a_writable_root(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        for container in containers(manifest):
            security = pod(manifest)["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] >= 999
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod(manifest)["automountServiceAccountToken"] is False
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_the_environment_has_settings_of_ours_only_with_values_that_they_accept(
    overlays: Mapping[str, list[Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = settings_classes()
    known = {f"BASIC_{name.upper()}" for kind in classes.values() for name in kind.model_fields}
    for manifests in overlays.values():
        config = only(manifests, "ConfigMap", "basic")["data"]
        for manifest, container in ours(manifests):
            # Kubernetes would set BASIC_API_PORT=tcp://… for the Service basic-api.
            assert pod(manifest)["enableServiceLinks"] is False
            assert container["envFrom"] == [{"configMapRef": {"name": "basic"}}]
            environment = config | {one["name"]: one.get("value", "1") for one in container.get("env", [])}
            assert environment.keys() - known <= {"HF_TOKEN"}
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                classes["worker"]()


def test_every_command_is_one_of_ours(manifests: list[Manifest]) -> None:
    for _, container in ours(manifests):
        words = container["command"]
        probes = [container[name] for name in ("startupProbe", "readinessProbe") if name in container]
        scripts = words[2].split(" && ") if words[:2] == ["sh", "-c"] else [" ".join(words)]
        for command in [*scripts, *(" ".join(probe["exec"]["command"]) for probe in probes if "exec" in probe)]:
            program, *arguments = command.split()
            if program == "python":
                assert arguments[0] == "-m"
                assert find_spec(arguments[1]) is not None
            else:
                assert program == "basic"
                parse(arguments)


def test_commands_are_those_of_docker_compose_which_a_test_runs_as_processes(
    overlays: Mapping[str, list[Manifest]],
) -> None:
    composed = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())["services"]
    trial = YAML(typ="safe").load((ROOT / "docs/compose-cpu.yml").read_text().replace("!reset ", ""))["services"]
    for manifest, container in ours(overlays["cpu-trial"]):
        name = container["name"]
        assert container["command"] == trial.get(name, {}).get("command", composed[name]["command"]), manifest["kind"]
    worker = containers(only(overlays["gpu"], "StatefulSet", "basic-worker"))[0]
    assert ["CMD", *worker["readinessProbe"]["exec"]["command"]] == composed["worker"]["healthcheck"]["test"]


def test_probes_and_ports_are_those_of_the_api_server(manifests: list[Manifest]) -> None:
    routes = {getattr(route, "path", "") for router in (service.router, metrics.router) for route in router.routes}
    probed = set()
    for manifest, container in ours(manifests):
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if (get := container.get(name, {}).get("httpGet")) is not None:
                probed.add(get["path"])
                assert ports[get["port"]] == settings_classes()["jobs"].model_fields["api_port"].default
        notes = manifest["spec"]["template"]["metadata"].get("annotations", {})
        if notes:
            assert notes["prometheus.io/port"] == str(ports["http"])
            assert notes["prometheus.io/path"] in routes
    assert probed == {"/healthz", "/readyz"}
    assert probed <= routes


def test_a_worker_has_no_probe_that_ends_it_while_the_database_is_away(manifests: list[Manifest]) -> None:
    assert {container["name"] for _, container in ours(manifests) if "livenessProbe" in container} == {"api"}


def test_selectors_find_the_pods_that_they_mean(overlays: Mapping[str, list[Manifest]]) -> None:
    for manifests in overlays.values():
        labels = {m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"] for m in manifests if pod(m)}
        for manifest in manifests:
            spec = manifest.get("spec", {})
            selector = spec.get("podSelector", spec.get("selector", {}))
            wanted = selector.get("matchLabels", selector)
            found = {name for name, label in labels.items() if wanted and wanted.items() <= label.items()}
            if manifest["metadata"]["name"] == "basic-accepts-nothing":
                assert found == {"basic-api", "basic-ingest", "basic-worker", "basic-migrate"}
            elif wanted:
                assert found == {manifest["metadata"]["name"].removesuffix("-accepts-calls")}, manifest
            target = spec.get("scaleTargetRef")
            assert target is None or only(manifests, target["kind"], target["name"])["apiVersion"] == "apps/v1"


def test_secrets_are_files_that_make_secrets_writes_and_no_manifest_holds_one(
    manifests: list[Manifest], tmp_path: Path
) -> None:
    subprocess.run(["sh", str(ROOT / ".ci/make-secrets"), str(tmp_path)], check=True, capture_output=True)
    written = {file.name for file in tmp_path.iterdir()}
    for manifest in manifests:
        assert manifest["kind"] != "Secret"
        for volume in pod(manifest).get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["secretName"] == "basic"
                assert {item["key"] for item in volume["secret"]["items"]} <= written
                assert {item["key"] for item in volume["secret"]["items"]} == {
                    item["path"] for item in volume["secret"]["items"]
                }
        for reference in manifest.get("spec", {}).get("secretTargetRef", []):
            assert (reference["name"], reference["key"]) == ("basic", "basic_database_url")
    assert (tmp_path / "basic_database_url").read_text().startswith("postgresql://"), "KEDA knows no driver's name"


def test_the_autoscaler_counts_the_requests_of_the_model_that_is_served(
    overlays: Mapping[str, list[Manifest]],
) -> None:
    manifests = overlays["gpu-scaled"]
    (trigger,) = only(manifests, "ScaledObject", "basic-worker")["spec"]["triggers"]
    target = only(manifests, "ConfigMap", "basic")["data"]["BASIC_TARGET"]
    assert f"jobs.model = '{model_name(target)}'" in trigger["metadata"]["query"]
    assert "replicas" not in only(manifests, "StatefulSet", "basic-worker")["spec"], "it would undo the autoscaler"


def test_the_trial_has_the_servers_that_its_secrets_name_and_the_base_has_none(
    overlays: Mapping[str, list[Manifest]],
) -> None:
    trial = {manifest["metadata"]["name"] for manifest in overlays["cpu-trial"]}
    assert {"redis", "postgres"} <= trial
    assert not {"redis", "postgres"} & {manifest["metadata"]["name"] for manifest in overlays["gpu"]}
    command = containers(only(overlays["cpu-trial"], "Deployment", "redis"))[0]["command"][-1]
    empty = "''"  # in a shell
    assert [name for name, value in SERVER_OPTIONS.items() if f"--{name} {value or empty} " not in command] == []


def test_one_gpu_a_pod_and_none_in_the_trial(overlays: Mapping[str, list[Manifest]]) -> None:
    def limits(overlay: str) -> Any:
        return containers(only(overlays[overlay], "StatefulSet", "basic-worker"))[0]["resources"]["limits"]

    assert limits("gpu")["nvidia.com/gpu"] == limits("gpu-scaled")["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits("cpu-trial")
