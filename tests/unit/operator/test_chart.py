"""The Helm chart, rendered without a cluster: its values, and the objects that it makes of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from distill_operator.pod_template import POD_PORT
from distill_operator.settings import Settings

from tests.fakes import chart as rendered
from tests.fakes.chart import APP_VERSION, FOLDER, REQUIRED, SCHEMA, VALUES, Chart, Json, find, nested
from vpmoe.api import labels
from vpmoe.api.runtime import Role

POD = "Deployment spec.template.spec"
TAINT = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}
SPREAD = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
PREFERRED = {"preferredDuringSchedulingIgnoredDuringExecution": []}
AFFINITIES = ("nodeAffinity", "podAffinity", "podAntiAffinity")
PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}

SWITCHES: Json = {
    "networkPolicy": {"enabled": True},
    "monitoring": {"enabled": True, "alerts": True, "dashboards": True},
}
"""Values that switch on what is optional."""
UNUSED = {"global", "gitSha"}
"""Values that the chart accepts and does not use: Helm's own, and one that earlier versions needed."""
PLACES: dict[str, tuple[Any, ...]] = {
    "images.registry": (
        "other.example.com/",
        "settings images.trainer",
        f"other.example.com/trainer:{APP_VERSION}",
    ),
    "images.tag": ("v2", "settings images.inference", "r.example.com/vpmoe/inference:v2"),
    "images.operator": ("mine:1", f"{POD}.initContainers.0.image"),
    "images.trainer": ("mine:1", "settings images.trainer"),
    "images.inference": ("mine:1", "settings images.inference"),
    "imagePullSecrets": ([{"name": "pull"}], f"{POD}.imagePullSecrets"),
    "watchNamespaces": (["team-a", "team-b"], "settings watchNamespaces"),
    "replicas": (3, "Deployment spec.replicas"),
    "resyncSeconds": (0.5, "settings resyncSeconds"),
    "reconcileSeconds": (0.5, "settings reconcileSeconds"),
    "pollSeconds": (0.5, "settings pollSeconds"),
    "progressSeconds": (0.5, "settings progressSeconds"),
    "stuckSeconds": (10_000_000, "settings stuckSeconds"),
    "gpuResource": ("example.com/gpu", "settings gpuResource"),
    "scheduling": ("Immediate", "settings scheduling"),
    "logLevel": ("debug", "settings logLevel"),
    "leaseSeconds": (10_000_000, "settings lease.seconds"),
    "backoff.baseSeconds": (0.25, "settings backoff.baseSeconds"),
    "backoff.limitSeconds": (10_000_000, "settings backoff.limitSeconds"),
    **{
        f"jobResources.{role}.{part}": ({"memory": "3Gi"}, f"settings resources.{role}.{part}.memory", "3Gi")
        for role in get_args(Role)
        for part in ("requests", "limits")
    },
    "resources.requests": ({"memory": "3Gi"}, f"{POD}.containers.0.resources.requests.memory", "3Gi"),
    "resources.limits": ({"memory": "3Gi"}, f"{POD}.initContainers.0.resources.limits.memory", "3Gi"),
    "env": ([{"name": "A", "value": "b"}], f"{POD}.initContainers.0.env.1", {"name": "A", "value": "b"}),
    "podLabels": ({"team": "x"}, "Deployment spec.template.metadata.labels.team", "x"),
    "podAnnotations": ({"team": "x"}, "Deployment spec.template.metadata.annotations.team", "x"),
    "nodeSelector": ({"disk": "ssd"}, f"{POD}.nodeSelector"),
    "tolerations": ([TAINT], f"{POD}.tolerations"),
    **{f"affinity.{kind}": (PREFERRED, f"{POD}.affinity.{kind}") for kind in AFFINITIES},
    "topologySpreadConstraints": (
        [SPREAD],
        f"{POD}.topologySpreadConstraints.0.topologyKey",
        SPREAD["topologyKey"],
    ),
    "priorityClassName": ("high", f"{POD}.priorityClassName"),
    "serviceAccountName": ("mine", f"{POD}.serviceAccountName"),
    "serviceAccountAnnotations": ({"role": "arn"}, "ServiceAccount metadata.annotations"),
    "labels": ({"team": "x"}, "ConfigMap/distill-operator metadata.labels.team", "x"),
    "annotations": ({"team": "x"}, "ConfigMap/distill-operator metadata.annotations"),
    "aggregateRoles": (
        False,
        "ClusterRole/-editor metadata.labels.rbac~authorization~k8s~io/aggregate-to-edit",
        None,
    ),
    "networkPolicy.enabled": (True, "NetworkPolicy kind", "NetworkPolicy"),
    "networkPolicy.metricsFrom": ([PEER], "NetworkPolicy spec.ingress.0.from"),
    "networkPolicy.apiServerPorts": ([16443], "NetworkPolicy spec.egress.0.ports.0.port", 16443),
    "networkPolicy.apiServerCidrs": (
        ["192.0.2.1/32"],
        "NetworkPolicy spec.egress.0.to.0.ipBlock.cidr",
        "192.0.2.1/32",
    ),
    "networkPolicy.extraEgress": ([{"to": [PEER]}], "NetworkPolicy spec.egress.3.to.0", PEER),
    "monitoring.enabled": (True, "Service kind", "Service"),
    "monitoring.intervalSeconds": (90, "ServiceMonitor spec.endpoints.0.interval", "90s"),
    "monitoring.labels": ({"release": "p"}, "PodMonitor metadata.labels.release", "p"),
    "monitoring.alerts": (True, "PrometheusRule kind", "PrometheusRule"),
    "monitoring.dashboards": (True, "ConfigMap/-dashboard-run kind", "ConfigMap"),
    "monitoring.dashboardLabels": ({"a": "b"}, "ConfigMap/-dashboard-operator metadata.labels.a", "b"),
}
"""Value → what a test sets it to, the place where that must appear, and what appears there if not the same.
A dot in a key is written ~."""


@pytest.fixture(scope="module")
def chart(helm: Path) -> Chart:
    return Chart(helm)


def look(objects: list[Json], place: str) -> Any:
    """What is at "Kind path", "Kind/suffix of the name path" or "settings path"; None if nothing is."""
    where, path = place.split(" ")
    kind, _, suffix = where.partition("/")
    found: Any = rendered.settings(objects) if kind == "settings" else find(objects, kind, suffix)
    for name in path.split("."):
        name = name.replace("~", ".")
        items = dict(enumerate(found)) if isinstance(found, list) else found or {}
        found = items.get(int(name) if isinstance(found, list) else name)
    return found


def switched_on(path: str, value: Any) -> Json:
    """Values with this one changed, and what it belongs to switched on."""
    values = nested(path, value)
    group = path.split(".")[0]
    if group in SWITCHES:
        values[group] = {**SWITCHES[group], **values[group]}
    if group in REQUIRED:
        values = {
            **REQUIRED,
            group: {**REQUIRED[group], **values[group]} if group == "images" else values[group],
        }
    return values


def test_the_chart_passes_lint(chart: Chart) -> None:
    ended = chart.run("lint", "--strict", str(FOLDER), values=REQUIRED)
    assert ended.returncode == 0, ended.stdout


def test_every_value_is_described_and_has_a_default_and_a_type() -> None:
    def part(schema: Json, values: Any, path: str) -> Iterator[str]:
        for name, found in schema["properties"].items():
            one, where = rendered.resolved(found), f"{path}.{name}".lstrip(".")
            if not one.get("description", "").endswith("."):
                yield f"{where} has no description"
            if "type" not in one and "enum" not in one:
                yield f"{where} has no type"
            if one.get("additionalProperties") is False:
                default = values.get(name, {}) if isinstance(values, dict) else {}
                yield from part(one, default, where)
            if one.get("type") == "array" and "properties" in (item := rendered.resolved(one["items"])):
                assert item["additionalProperties"] is False, where
                yield from part(item, {}, f"{where}[]")

    assert not list(part(SCHEMA, VALUES, ""))
    assert SCHEMA["properties"].keys() - UNUSED == VALUES.keys() == set(SCHEMA["required"])
    for name in ("images", "backoff", "networkPolicy", "monitoring"):
        group = SCHEMA["properties"][name]
        assert group["properties"].keys() == VALUES[name].keys() == set(group["required"])
    assert SCHEMA["properties"]["jobResources"]["properties"].keys() == set(get_args(Role))


def test_every_value_has_a_test_of_its_effect() -> None:
    assert PLACES.keys() == {path for path, _ in rendered.fields()} - UNUSED


@pytest.fixture(scope="module")
def defaults(chart: Chart) -> list[Json]:
    """The objects of the default values, with the optional ones."""
    return chart.render(SWITCHES)


@pytest.mark.parametrize("path", PLACES)
def test_a_value_appears_where_it_is_used(chart: Chart, defaults: list[Json], path: str) -> None:
    value, place, *other = PLACES[path]
    expected = other[0] if other else value
    objects = chart.render(switched_on(path, value))
    assert look(objects, place) == expected
    if value is not True:
        assert look(defaults, place) != expected, "it is the default: this test shows nothing"
    Settings.model_validate(rendered.settings(objects))


def test_the_settings_of_the_default_values_are_valid(chart: Chart) -> None:
    found = Settings.model_validate(rendered.settings(chart.render()))
    assert found.resources.keys() == set(get_args(Role))
    assert found.images.trainer == f"r.example.com/vpmoe/trainer:{APP_VERSION}"


def typos() -> list[str]:
    """A path with an unknown last name, for every map of values that has fixed names."""

    def maps(schema: Json, path: str) -> Iterator[str]:
        one = rendered.resolved(schema)
        if one.get("type") == "array":
            yield from maps(one["items"], f"{path}[]")
        if one.get("additionalProperties") is False:
            yield f"{path}.typo".lstrip(".")
            for name, found in one["properties"].items():
                yield from maps(found, f"{path}.{name}".lstrip("."))

    return list(maps(SCHEMA, ""))


@pytest.mark.parametrize("path", typos())
def test_an_unknown_value_is_rejected_by_name(chart: Chart, path: str) -> None:
    value: Any = "x"
    for name in reversed(path.split(".")):
        value = {name.removesuffix("[]"): [value] if name.endswith("[]") else value}
    assert "additional properties 'typo' not allowed" in chart.rejection({**REQUIRED, **value})


@pytest.mark.parametrize("path", [path for path, _ in rendered.fields() if path not in UNUSED])
def test_a_value_of_another_type_is_rejected_by_name(chart: Chart, path: str) -> None:
    found: Any = VALUES
    for name in path.split("."):
        found = found.get(name, {})
    wrong = "text" if not isinstance(found, str) else 7
    assert f"at '/{path.replace('.', '/')}'" in chart.rejection(switched_on(path, wrong))


@pytest.mark.parametrize("path", ["", "images", "backoff", "networkPolicy", "monitoring"])
def test_a_default_that_is_removed_is_named(chart: Chart, path: str) -> None:
    """null removes a default in Helm. A template could then make something else: a rule for all ports."""
    removed: dict[str, Any] = dict.fromkeys(VALUES[path] if path else VALUES)
    message = chart.rejection(nested(path, removed) if path else removed)
    assert [name for name in removed if f"'{name}'" not in message] == []


@pytest.mark.parametrize(
    "values, message",
    [
        pytest.param({}, "--set images.registry=registry.example.com/vpmoe", id="no images"),
        pytest.param({"images": {"trainer": "mine"}}, "images.registry is empty", id="one image of three"),
        pytest.param({"resyncSeconds": 0}, "at '/resyncSeconds'", id="an interval of 0"),
        *(
            pytest.param({"watchNamespaces": [name]}, "at '/watchNamespaces/0'", id=f"namespace {name!r}")
            for name in ("", "Team", "a/b", "a.b", "x" * 64)
        ),
        pytest.param({"gpuResource": "gpu"}, "at '/gpuResource'", id="a resource without a domain"),
        pytest.param({"scheduling": "Never"}, "at '/scheduling'", id="another scheduling"),
        pytest.param({"logLevel": "trace"}, "at '/logLevel'", id="unknown level"),
        pytest.param({"env": [{"name": "NAMESPACE"}]}, "at '/env/0/name'", id="a variable of the chart"),
        pytest.param({"env": [{"name": "HOME"}]}, "at '/env/0/name'", id="another variable of the chart"),
        pytest.param(
            {"podLabels": {"app.kubernetes.io/name": "x"}}, "app.kubernetes.io~1name", id="a selector's label"
        ),
        pytest.param(
            {"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts'", id="no port"
        ),
        pytest.param(
            {**REQUIRED, "serviceAccountName": "mine", "serviceAccountAnnotations": {"a": "b"}},
            "annotate that account yourself, or leave serviceAccountName empty",
            id="annotations of an account that the chart does not create",
        ),
    ],
)
def test_invalid_values_are_rejected_with_the_remedy(chart: Chart, values: Json, message: str) -> None:
    assert message in chart.rejection(values)


@pytest.mark.parametrize("commit", ["a" * 40, "main", "", None])
def test_values_of_a_release_that_had_a_commit_still_work_and_the_commit_has_no_effect(
    chart: Chart, commit: str | None
) -> None:
    """With --reuse-values helm passes the values of the installed release, with the old chart's defaults."""
    reused = {**VALUES, "images": {**VALUES["images"], **REQUIRED["images"]}, "gitSha": commit}
    assert chart.render(reused) == chart.render()
    notes = chart.run("install", "x", str(FOLDER), "--dry-run=client", values=reused)
    assert notes.returncode == 0, notes.stderr
    assert ("The value gitSha is ignored" in notes.stdout) is bool(commit)


def with_text_everywhere(chart: Chart, text: str) -> list[Json]:
    """All objects, with this text in all names and strings that a user gives: namespaces, labels, tags."""
    maps = ("podLabels", "podAnnotations", "nodeSelector", "labels", "annotations")
    values = {
        "images": {"registry": text, "tag": text, "operator": text},
        "imagePullSecrets": [{"name": text}],
        "watchNamespaces": [text],
        "replicas": 2,
        "env": [{"name": "A", "value": text}],
        **{name: {"a": text} for name in maps},
        "tolerations": [{"key": text, "value": text}],
        "topologySpreadConstraints": [{**SPREAD, "topologyKey": text}],
        "priorityClassName": text,
        "serviceAccountAnnotations": {"b": text},
        "networkPolicy": {"enabled": True, "apiServerCidrs": [text]},
        "monitoring": {**SWITCHES["monitoring"], "labels": {"a": text}, "dashboardLabels": {"b": text}},
    }
    objects = chart.render(values, release=text, namespace=text)
    objects += chart.render({"serviceAccountName": text})
    for obj in objects:
        if "operator.yaml" in obj.get("data", {}):
            obj["data"] = rendered.settings([obj])
        if obj["kind"] == "Deployment":
            del obj["spec"]["template"]["metadata"]["annotations"]["vpmoe.dev/settings"]
    return objects


@pytest.fixture(scope="module")
def plain(chart: Chart) -> str:
    """The JSON of all objects with the text `plain`."""
    return json.dumps(with_text_everywhere(chart, "plain"), sort_keys=True)


@pytest.mark.parametrize("text", ["123", "1e3", "true", "null", "0x1f", "2020-01-01"])
def test_text_that_looks_like_another_type_stays_text(chart: Chart, plain: str, text: str) -> None:
    found = json.dumps(with_text_everywhere(chart, text))
    assert json.loads(plain.replace("plain", text)) == json.loads(found)


@pytest.mark.parametrize(
    "values, kinds",
    [
        pytest.param({}, set(), id="default values"),
        pytest.param({"replicas": 2}, {"PodDisruptionBudget"}, id="a standby"),
        pytest.param({"replicas": 0}, set(), id="stopped"),
        pytest.param({"networkPolicy": {"enabled": True}}, {"NetworkPolicy"}, id="network policy"),
        pytest.param(
            {"monitoring": {"enabled": True}}, {"Service", "ServiceMonitor", "PodMonitor"}, id="monitoring"
        ),
        pytest.param({"monitoring": {"alerts": True}}, {"PrometheusRule"}, id="alerts"),
        pytest.param({"monitoring": {"dashboards": True}}, {"ConfigMap"}, id="dashboards"),
    ],
)
def test_optional_objects_are_made_only_if_they_are_asked_for(
    chart: Chart, values: Json, kinds: set[str]
) -> None:
    always = {
        "ServiceAccount",
        "ConfigMap",
        "Deployment",
        "ClusterRole",
        "ClusterRoleBinding",
        "Role",
        "RoleBinding",
    }
    assert {obj["kind"] for obj in chart.render(values)} == always | kinds


def test_labels_and_annotations_are_on_every_object_and_change_no_selector(chart: Chart) -> None:
    values = {
        "replicas": 2,
        "watchNamespaces": ["a"],
        **SWITCHES,
    }
    marks = {"labels": {"team": "x", "app.kubernetes.io/part-of": "mine"}, "annotations": {"team": "x"}}
    plain, marked = chart.render(values), chart.render({**values, **marks})
    for before, after in zip(plain, marked, strict=True):
        assert after["metadata"]["labels"] == {**before["metadata"]["labels"], **marks["labels"]}
        assert after["metadata"]["annotations"] == {
            **before["metadata"].get("annotations", {}),
            **marks["annotations"],
        }
        for obj in (before, after):
            del obj["metadata"], obj.get("spec", {}).get("template", {"metadata": 0})["metadata"]
        assert before == after


def test_every_selector_matches_the_operators_pod(chart: Chart) -> None:
    objects = chart.render(
        {
            "replicas": 2,
            "podLabels": {"a": "b"},
            "topologySpreadConstraints": [SPREAD],
            "networkPolicy": {"enabled": True},
            "monitoring": {"enabled": True},
        }
    )
    pod = find(objects, "Deployment")["spec"]["template"]
    selectors = [
        *(
            find(objects, kind)["spec"]["selector"]["matchLabels"]
            for kind in ("Deployment", "PodDisruptionBudget")
        ),
        find(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        find(objects, "Service")["spec"]["selector"],
        pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= pod["metadata"]["labels"].items() for selector in selectors)
    service = find(objects, "Service")
    monitored = find(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= service["metadata"]["labels"].items()


def test_a_spread_constraint_with_a_selector_keeps_it(chart: Chart) -> None:
    mine = {**SPREAD, "labelSelector": {"matchLabels": {"a": "b"}}}
    pod = find(chart.render({"topologySpreadConstraints": [mine]}), "Deployment")["spec"]["template"]["spec"]
    assert pod["topologySpreadConstraints"] == [mine]


def test_the_pods_satisfy_the_restricted_standard(chart: Chart) -> None:
    """The fields that the restricted pod security standard requires, and those that baseline forbids."""
    pod = find(chart.render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
    assert [sorted(volume.keys() - {"name"}) for volume in pod["volumes"]] == [["configMap"], ["emptyDir"]]
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all("hostPort" not in port for port in container.get("ports", []))
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("namespaces", [[], ["team-a", "team-b"]])
def test_permissions_are_named_and_granted_where_runs_are(chart: Chart, namespaces: list[str]) -> None:
    objects = chart.render({"watchNamespaces": namespaces})
    roles = {
        (obj["kind"], obj["metadata"].get("namespace", "")): rendered.permissions(obj["rules"])
        for obj in objects
        if obj["kind"] in ("Role", "ClusterRole")
        and not obj["metadata"]["name"].endswith(("-editor", "-viewer", "-lease"))
    }
    whole = rendered.permissions(rendered.operator_rules(objects, "vpmoe-system"))
    assert set().union(*roles.values()) < whole, "and the lease's"
    assert "*" not in json.dumps(sorted(whole))
    everywhere = roles.pop(("ClusterRole", ""))
    of_a_namespace = everywhere if not namespaces else roles[("Role", "team-a")]
    assert ("vpmoe.dev", "distillruns", "list") in of_a_namespace
    assert set(roles) == {("Role", name) for name in namespaces}
    if namespaces:
        assert roles[("Role", "team-a")] == roles[("Role", "team-b")]
        assert {resource for _, resource, _ in everywhere} == {"nodes", "customresourcedefinitions"}
    for rule in rendered.operator_rules(objects, "vpmoe-system"):
        if "customresourcedefinitions" in rule["resources"]:
            assert rule["resourceNames"] == ["distillruns.vpmoe.dev"]


def test_people_get_no_right_to_write_a_status(chart: Chart) -> None:
    objects = chart.render()
    editor, viewer = (
        rendered.permissions(find(objects, "ClusterRole", suffix)["rules"])
        for suffix in ("-editor", "-viewer")
    )
    read = {"get", "list", "watch"}
    assert {verb for _, _, verb in viewer} == read
    assert {verb for _, resource, verb in editor if resource == "distillruns"} > read
    assert {verb for _, resource, verb in editor if resource != "distillruns"} == {"get"}
    assert {group for group, _, _ in editor | viewer} == {"vpmoe.dev"}


@pytest.mark.parametrize("namespaces", [[], ["team-a"]])
def test_the_network_policy_opens_what_the_operator_needs(chart: Chart, namespaces: list[str]) -> None:
    objects = chart.render({"networkPolicy": {"enabled": True}, "watchNamespaces": namespaces})
    policy = find(objects, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    container = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = [
        container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    ]
    assert (
        [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
        == list(ports)
        == [*set(probes)]
    )
    assert list(ports.values()) == [rendered.settings(objects)["port"]]
    assert all("from" not in rule for rule in policy["ingress"])
    api_server, dns, runs = policy["egress"]
    assert ([port["port"] for port in api_server["ports"]], "to" in api_server) == ([443, 6443], False)
    assert [(port["protocol"], port["port"]) for port in dns["ports"]] == [("UDP", 53), ("TCP", 53)]
    assert [port["port"] for port in runs["ports"]] == [POD_PORT]
    (pods,) = runs["to"]
    assert pods["podSelector"] == {"matchExpressions": [{"key": labels.RUN, "operator": "Exists"}]}
    (selected,) = pods["namespaceSelector"].get("matchExpressions", [{"values": []}])
    assert selected["values"] == namespaces


@pytest.mark.parametrize("namespaces", [[], ["team-a"]])
def test_the_monitors_select_the_operator_and_the_pods_of_its_runs(
    chart: Chart, namespaces: list[str]
) -> None:
    objects = chart.render({"monitoring": {"enabled": True}, "watchNamespaces": namespaces})
    service, operator, runs = (
        find(objects, kind)["spec"] for kind in ("Service", "ServiceMonitor", "PodMonitor")
    )
    assert [port["name"] for port in service["ports"]] == [end["port"] for end in operator["endpoints"]]
    assert [port["port"] for port in service["ports"]] == [rendered.settings(objects)["port"]]
    assert runs["selector"] == {"matchExpressions": [{"key": labels.RUN, "operator": "Exists"}]}
    assert [end["port"] for end in runs["podMetricsEndpoints"]] == ["metrics"]
    assert runs["namespaceSelector"] == ({"matchNames": namespaces} if namespaces else {"any": True})
