"""NetworkPolicies are the arrows of the design and no others, worked out as a cluster would."""

import ipaddress

import pytest
from helm_chart import MATRIX, Object, Values, case, objects, pods

CLAIM: Values = {"model": {"existingClaim": "c"}}
STAGES = ("gateway", "mm-encoder", "engine", "postproc")
DNS = "kube-system"
PRIVATE = """
10.0.0.1 127.0.0.1 169.254.169.254 172.16.9.9 172.31.0.1 192.168.1.1 100.64.0.1 224.0.0.1 255.255.255.255 0.0.0.0
198.18.0.1 ::1 fd00::1 fe80::1 ::ffff:10.0.0.1 ff02::1 2002:a00:1::1 2001:0:a00:1::
"""

Arrow = tuple[str, str, int | None]  # from, to, TCP port; None: any


def policies(items: list[Object] | tuple[Object, ...]) -> list[Object]:
    return [item for item in items if item["kind"] == "NetworkPolicy"]


def selected(policy: Object, labels: dict[str, str]) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def peers(rule: Object, side: str, components: dict[str, dict[str, str]]) -> list[str]:
    """Return the other side of a rule: components of the release, a namespace, or networks."""
    if side not in rule:
        return ["anybody"]
    found = []
    for peer in rule[side]:
        if "ipBlock" in peer:
            found.append(peer["ipBlock"]["cidr"])
        elif "namespaceSelector" in peer:
            found.append(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
        else:
            wanted = peer["podSelector"]["matchLabels"].items()
            found += [name for name, labels in components.items() if wanted <= labels.items()]
    return found


def arrows(items: list[Object] | tuple[Object, ...]) -> tuple[set[Arrow], set[Arrow]]:
    """Return what the policies let out of the pods and into them, without DNS."""
    components = {name: metadata["labels"] for name, (metadata, _) in pods(items).items()}
    outward, inward = set(), set()
    for policy in policies(items):
        for name in (name for name, labels in components.items() if selected(policy, labels)):
            for side, key, found in (("egress", "to", outward), ("ingress", "from", inward)):
                for rule in policy["spec"].get(side, []):
                    ports = [port["port"] for port in rule.get("ports", [{"port": None}])]
                    for other in peers(rule, key, components):
                        ends = (name, other) if side == "egress" else (other, name)
                        found |= {(*ends, port) for port in ports if port != 53}
    return outward, inward


# ------------------------------------------------------------------------------------------------- every connection

# Who else there is: the namespace, or the address outside the cluster, as policies see them.
OUTSIDE = {
    "clients": "ingress",
    "prometheus": "monitoring",
    "keda": "keda",
    "dns": DNS,
    "stranger": "default",
    "internet": "93.184.216.34",
    "metadata": "169.254.169.254",
    "neighbour": "10.9.9.9",
    "api": "192.0.2.1",
    "hub": "10.20.0.7",
}
PORTS = (53, 80, 443, 6379, 6443, 8180, 8181, 9121)


def admits(rule: Object, side: str, other: str, labels: dict[str, str], port: int) -> bool:
    """Return True if a rule lets `other` through: a pod of the release by its labels, or one of OUTSIDE."""
    if port not in [each["port"] for each in rule.get("ports", [{"port": port}])]:
        return False
    return side not in rule or any(is_peer(peer, OUTSIDE.get(other, ""), labels) for peer in rule[side])


def is_peer(peer: Object, where: str, labels: dict[str, str]) -> bool:
    if "ipBlock" in peer:
        block, address = peer["ipBlock"], where if where[:1].isdigit() else "10.244.0.9"  # of any pod
        outside = [ipaddress.ip_network(each) for each in block.get("except", [])]
        wanted = ipaddress.ip_address(address)
        return wanted in ipaddress.ip_network(block["cidr"]) and not any(wanted in each for each in outside)
    if "namespaceSelector" in peer:
        return bool(where) and peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == where
    return bool(labels) and peer["podSelector"]["matchLabels"].items() <= labels.items()


def connects(items: list[Object] | tuple[Object, ...], source: str, target: str, port: int) -> bool:
    """Return True if a cluster that enforces policies lets a connection through, at both of its ends."""
    components = {name: metadata["labels"] for name, (metadata, _) in pods(items).items()}
    for end, other, side, key in ((source, target, "egress", "to"), (target, source, "ingress", "from")):
        if end not in components:
            continue  # no policy of ours
        selecting = [each["spec"] for each in policies(items) if selected(each, components[end])]
        rules = [rule for spec in selecting for rule in spec.get(side, [])]
        restricted = any(side.title() in spec["policyTypes"] for spec in selecting)
        if restricted and not any(admits(rule, key, other, components.get(other, {}), port) for rule in rules):
            return False
    return True


def connections(name: str) -> set[tuple[str, str, int]]:
    inside, outside = list(pods(case(name))), list(OUTSIDE)
    ends = [(one, other) for one in inside for other in [*inside, *outside] if one != other]
    ends += [(one, other) for one in outside for other in inside]
    return {(*end, port) for end in ends for port in PORTS if connects(case(name), *end, port)}


def everywhere(component: str, target: str) -> set[tuple[str, str, int]]:
    return {(component, target, port) for port in PORTS}


# An API server at a public address, as this one, is part of the internet.
INTERNET = everywhere("mm-encoder", "internet") | everywhere("mm-encoder", "api")
ALWAYS = {(stage, "redis", 6379) for stage in STAGES} | {("test", "gateway", 8180)} | INTERNET
TABLE: dict[str, set[tuple[str, str, int]]] = {
    "defaults": ALWAYS | {(other, "gateway", 8180) for other in OUTSIDE},
    "autoscaler of its own": ALWAYS
    | {(other, "gateway", 8180) for other in OUTSIDE}
    | {("prometheus", component, 8181) for component in (*STAGES, "autoscaler")}
    | {("prometheus", "redis", 9121), ("autoscaler", "redis", 6379)}
    | everywhere("autoscaler", "api"),
    "fetched model, keda, monitoring, tls": ALWAYS
    | {("clients", "gateway", 8180), ("keda", "redis", 6379), ("prometheus", "redis", 9121)}
    | {("prometheus", stage, 8181) for stage in STAGES}
    | everywhere("model", "hub"),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_connection_that_can_be_made_is_in_the_table(name: str) -> None:
    """From every pod to every other, to and from everybody outside, on every port that anything listens on."""
    dns = {(component, "dns", 53) for component in pods(case(name))}
    assert connections(name) == TABLE[name] | dns


def test_without_policies_everybody_reaches_everybody() -> None:
    found = connections("cpu, nothing kept, no policies")
    assert ("stranger", "redis", 6379) in found
    assert ("engine", "metadata", 80) in found


@pytest.mark.parametrize("name", [name for name in MATRIX if "no policies" not in name])
def test_every_pod_is_closed_both_ways_but_for_its_rules(name: str) -> None:
    for component, (metadata, _) in pods(case(name)).items():
        directions = [
            direction
            for policy in policies(case(name))
            if selected(policy, metadata["labels"])
            for direction in policy["spec"]["policyTypes"]
        ]
        assert {"Ingress", "Egress"} <= set(directions), component


def test_the_arrows_are_the_designs() -> None:
    outward, inward = arrows(objects(CLAIM))
    to_redis = {(stage, "redis", 6379) for stage in STAGES}
    assert outward == to_redis | {
        ("mm-encoder", "0.0.0.0/0", None),
        ("mm-encoder", "2000::/3", None),
        ("test", "gateway", 8180),
    }
    assert inward == to_redis | {("anybody", "gateway", 8180)}


def test_named_clients_scrapers_and_keda_add_their_arrows_only() -> None:
    outward, inward = arrows(case("fetched model, keda, monitoring, tls"))
    assert inward == {(stage, "redis", 6379) for stage in (*STAGES, "keda")} | {
        ("ingress", "gateway", 8180),
        ("test", "gateway", 8180),
        *(("monitoring", stage, 8181) for stage in STAGES),
        ("monitoring", "redis", 9121),
    }
    assert {arrow for arrow in outward if arrow[0] == "model"} == {("model", "10.20.0.0/16", None)}
    assert {arrow[0] for arrow in outward if arrow[1] == "0.0.0.0/0"} == {"mm-encoder"}


def test_an_autoscaler_reaches_redis_and_the_api_server() -> None:
    outward, inward = arrows(case("autoscaler of its own"))
    assert {arrow for arrow in outward if arrow[0] == "autoscaler"} == {
        ("autoscaler", "redis", 6379),
        ("autoscaler", "192.0.2.1/32", None),
    }
    assert {arrow for arrow in inward if "autoscaler" in arrow} == {
        ("autoscaler", "redis", 6379),
        ("monitoring", "autoscaler", 8181),
    }
    outward, _ = arrows(objects({**CLAIM, "autoscaling": {"kind": "builtin"}}))
    assert {arrow for arrow in outward if arrow[1] == "anybody"} == {
        ("autoscaler", "anybody", port) for port in (443, 6443, 8443, 16443)
    }


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.tracing:4318", 4318),
        ("https://collector.example.com/v1/traces", 443),
        ("http://192.0.2.9", 80),
        ("http://[2001:db8::1]:4318", 4318),
        ("http://[2001:db8::1]", 80),
    ],
)
def test_spans_reach_the_collector_from_the_four_services_only(endpoint: str, port: int) -> None:
    values: Values = {**CLAIM, "settings": {"otlp_endpoint": endpoint}, "autoscaling": {"kind": "builtin"}}
    collector = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tracing"}}}]
    without, _ = arrows(objects({**CLAIM, "autoscaling": {"kind": "builtin"}}))
    named, _ = arrows(objects({**values, "networkPolicy": {"collector": collector}}))
    assert named - without == {(stage, "tracing", port) for stage in STAGES}
    anywhere, _ = arrows(objects(values))
    assert anywhere - without == {(stage, "anybody", port) for stage in STAGES}


def test_a_download_may_reach_the_internet_where_no_hub_is_named() -> None:
    outward, _ = arrows(objects({"model": {"download": {"repository": "baidu/ernie"}}}))
    assert {arrow[0] for arrow in outward if arrow[1] == "0.0.0.0/0"} == {"mm-encoder", "model"}


def test_an_external_redis_is_reached_at_its_ports_and_addresses() -> None:
    outward, inward = arrows(case("external redis with users, hpa, placement"))
    reached = {(stage, "192.0.2.0/24", port) for stage in STAGES for port in (6380, 6381)}
    assert {arrow for arrow in outward if arrow[0] != "test"} == reached | {
        ("mm-encoder", "0.0.0.0/0", None),
        ("mm-encoder", "2000::/3", None),
        ("mm-encoder", "10.1.0.0/16", None),
    }
    assert inward == {("anybody", "gateway", 8180)}
    outward, _ = arrows(case("external redis, open"))
    assert ("engine", "anybody", 6379) in outward


def test_sentinels_and_the_primaries_behind_them_are_reached() -> None:
    redis = {"external": {"url": "redis+sentinel://s0:26380,s1/main/3"}}
    outward, _ = arrows(objects({**CLAIM, "redis": redis, "networkPolicy": {"enabled": True}}))
    assert {port for stage, _, port in outward if stage == "postproc"} == {26380, 26379, 6379}


def test_dns_is_the_clusters() -> None:
    (policy,) = [item for item in policies(objects(CLAIM)) if item["metadata"]["name"].endswith("-dns")]
    (rule,) = policy["spec"]["egress"]
    assert rule["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": DNS}}}]


@pytest.mark.parametrize("address", PRIVATE.split())
def test_media_cannot_be_fetched_from_private_networks(address: str) -> None:
    assert not internet(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_media_can_be_fetched_from_the_internet(address: str) -> None:
    assert internet(address)


def internet(address: str) -> bool:
    """Return True if mm-encoder's policy lets packets out to this address."""
    (policy,) = [item for item in policies(objects(CLAIM)) if item["metadata"]["name"] == "millrace-mm-encoder"]
    blocks = [peer["ipBlock"] for rule in policy["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer]
    wanted = ipaddress.ip_address(address)

    def within(text: str) -> bool:
        network = ipaddress.ip_network(text)
        return wanted.version == network.version and wanted in network

    return any(within(block["cidr"]) and not any(map(within, block["except"])) for block in blocks)
