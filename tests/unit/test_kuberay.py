"""The RayJob manifest and the Dockerfile, as far as they can be checked without an engine.

The rules below are those of the RayJob fields that we use: names, types, and what has to agree.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from jobs import cli, config
from jobs.locations import LOCATIONS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "kuberay"
# field -> type, or the rules of what is below it; a list holds the rules of each item; "?" marks optional fields
CONTAINER = {
    "name": str,
    "image": str,
    "ports?": [{"containerPort": int, "name": str}],
    "resources": {"requests": dict, "limits": dict},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
VOLUME = {"name": str, "persistentVolumeClaim": {"claimName": str}}
TEMPLATE = {"spec": {"containers": [CONTAINER], "volumes": [VOLUME]}}
RAYJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "headGroupSpec": {"rayStartParams": dict, "template": TEMPLATE},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": dict,
                    "template": TEMPLATE,
                }
            ],
        },
    },
}


def broken(value, rules, where="") -> list[str]:
    """Places where a value does not follow rules."""
    if isinstance(rules, type):
        return [] if type(value) is rules else [f"{where}: {value!r} is no {rules.__name__}"]
    if isinstance(rules, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: expected a list"]
        return [line for number, item in enumerate(value) for line in broken(item, rules[0], f"{where}[{number}]")]
    names = {name.rstrip("?"): rule for name, rule in rules.items()}
    needed = {name for name in rules if not name.endswith("?")}
    found = [f"{where}: unknown field {name}" for name in value.keys() - names]
    found += [f"{where}: no field {name}" for name in needed - value.keys()]
    return found + [
        line for name in value.keys() & names for line in broken(value[name], names[name], f"{where}.{name}")
    ]


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def pods(manifest):
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_fields(manifest):
    assert broken(manifest, RAYJOB) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")


def test_the_rules_find_mistakes(manifest):
    assert broken({**manifest, "sepc": {}}, RAYJOB) == [": unknown field sepc"]
    assert broken({**manifest, "metadata": {"name": 1}}, RAYJOB) == [".metadata.name: 1 is no str"]
    assert broken({**manifest, "metadata": {}}, RAYJOB) == [".metadata: no field name"]


def test_start_parameters_are_text_and_flags_of_ray(manifest):
    from ray.scripts.scripts import start

    flags = {name.lstrip("-") for option in start.params for name in option.opts}
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["rayStartParams"].keys() <= flags


def test_names_are_what_kubernetes_allows(manifest, pods):
    names = [manifest["metadata"]["name"], *(container["name"] for pod in pods for container in pod["containers"])]
    names += [port["name"] for pod in pods for container in pod["containers"] for port in container.get("ports", [])]
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for name in names)
    assert len(manifest["metadata"]["name"]) <= 47  # KubeRay derives longer names from it


def test_quantities(pods):
    for pod in pods:
        for container in pod["containers"]:
            for amounts in container["resources"].values():
                assert all(re.fullmatch(r"\d+(Gi|Mi)?", amount) for amount in amounts.values())
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_every_pod_sees_what_the_command_names(manifest, pods):
    words = shlex.split(manifest["spec"]["entrypoint"])
    settings = vars(cli._parser().parse_args(cli._spelled_out(words[1:])).batched)
    places = [settings[name] for name in LOCATIONS & settings.keys() if settings[name]]
    assert len(places) == 3
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            assert all(any(place.startswith(f"{mount}/") for mount in mounts) for place in places)
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods for volume in pod["volumes"]}
    assert len(claims) == 1


def test_the_command_is_one_of_ours(manifest):
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[0] == "anomalydino"
    options = cli._parser().parse_args(cli._spelled_out(words[1:]))
    built = cli._build(config.BatchedConfig, options[options.subcommand])
    assert built.ray_address is None


def test_image_and_versions_agree(manifest, pods):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {f"anomalydino:{version}"}
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert f"-t anomalydino:{version} ." in dockerfile
    assert set(re.findall(r"anomalydino_plugin-(.+?)-py3-none-any\.whl", dockerfile)) == {version}
    ray = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == ray


def test_dockerfile_instructions_and_copied_files():
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "FROM python:3.11-slim"
    assert {line.split()[0] for line in lines} <= {"FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV"}
    copied = next(line for line in lines if line.startswith("COPY")).split()[1:-1]
    assert (ROOT / copied[0]).is_file()
    assert copied[1].startswith("dist/")  # made by `make wheel`
