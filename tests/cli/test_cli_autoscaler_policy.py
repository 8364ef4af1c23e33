"""How many replicas there should be: the decision without any IO."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.autoscaler.observe import observe
from cli.autoscaler.policy import Decision, Memory, Rules, Seen, decide, wanted
from shared.bus.pipeline_view import BlobsView, ConsumerView, PipelineView, QueueView, ReplicaView, StageView

RULES = Rules(deployment="engine", target=32, least=0, most=4, cooldown_s=60)
TICK = 5.0


class Stage:
    """A stage that gets what is decided at once."""

    def __init__(self, rules: Rules = RULES, replicas: int = 0) -> None:
        self.rules = rules
        self.replicas = replicas
        self.now = 1000.0
        self.memory = Memory(self.now)
        self.added = 1000

    def look(self, work: int, coming: int = 0, arrived: int = 0) -> Decision:
        self.added += arrived
        seen = Seen(work, self.replicas, coming, self.added)
        self.memory, decision = decide(self.rules, seen, self.memory, self.now)
        if decision.step in ("out", "in"):
            self.replicas = decision.replicas
        self.now += TICK
        return decision

    def look_for(self, seconds: float, work: int, coming: int = 0) -> list[str]:
        return [self.look(work, coming).step for _ in range(int(seconds / TICK))]


@pytest.mark.parametrize(
    ("work", "coming", "replicas"),
    [(0, 0, 0), (1, 0, 1), (32, 0, 1), (33, 0, 2), (128, 0, 4), (10_000, 0, 4), (0, 3, 1), (64, 3, 2)],
)
def test_what_work_asks_for(work: int, coming: int, replicas: int) -> None:
    assert wanted(RULES, Seen(work, 0, coming)) == replicas


def test_the_first_request_wakes_a_sleeping_stage() -> None:
    stage = Stage()
    assert stage.look(0).step == "stay"
    assert stage.look(1) == Decision("out", 1, "1 in work or waiting, 32 a replica")


def test_it_wakes_before_the_work_has_reached_it() -> None:
    stage = Stage()
    assert stage.look(0, coming=1) == Decision("out", 1, "0 in work or waiting, 1 coming, 32 a replica")


def test_more_are_asked_for_at_once_and_not_again_while_they_start() -> None:
    stage = Stage(replicas=1)
    assert stage.look(100).step == "out"
    assert stage.replicas == 4
    assert set(stage.look_for(120, 100)) == {"stay"}


def test_fewer_come_after_the_cool_down_and_are_named_before() -> None:
    stage = Stage()
    stage.look_for(60, 100)
    assert stage.look_for(55, 30) == ["stay"] * 11
    assert stage.look(30).step == "mark"
    assert stage.replicas == 4
    assert stage.look(30).step == "in"
    assert stage.replicas == 1


def test_a_stage_whose_work_is_done_between_two_looks_does_not_sleep() -> None:
    stage = Stage(replicas=2)
    stage.look(0)
    for _ in range(100):
        stage.look(0, arrived=3)
    assert stage.replicas == 1, "two are more than work that is never seen can need"
    decision = stage.look(0, arrived=3)
    assert decision.why == "0 in work or waiting, 3 more since the last look, enough for 1"
    stage.look_for(70, 0)
    assert stage.replicas == 0, "once nothing comes any more it sleeps"


def test_what_a_stream_had_before_the_first_look_or_before_it_was_made_anew_is_no_work() -> None:
    stage = Stage()
    assert stage.look(0).step == "stay"
    stage.added = 0
    assert stage.look(0).step == "stay"
    stage.added = 2
    assert stage.look(0).step == "out"


def test_a_moment_of_work_within_the_cool_down_keeps_them() -> None:
    stage = Stage()
    stage.look_for(60, 100)
    for _ in range(10):
        assert "in" not in stage.look_for(50, 0)
        stage.look(97)
    assert stage.replicas == 4


def test_work_that_comes_back_unnames_them() -> None:
    stage = Stage()
    stage.look_for(60, 100)
    stage.look_for(55, 0)
    assert stage.look(0).step == "mark"
    assert stage.look(100).step == "stay"
    assert stage.look(0).step == "stay"


def test_a_new_leader_takes_nothing_away_before_it_has_watched() -> None:
    stage = Stage(replicas=4)
    assert set(stage.look_for(60, 0)) == {"stay"}
    assert stage.look(0).step == "mark"
    assert stage.look(0).step == "in"
    assert stage.replicas == 0


def test_limits_hold_whoever_set_the_number() -> None:
    stage = Stage(Rules(deployment="d", target=8, least=2, most=3, cooldown_s=10), replicas=0)
    stage.look(0)
    assert stage.replicas == 2
    stage.replicas = 9
    stage.look_for(30, 1000)
    assert stage.replicas == 3


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 64),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_whatever_comes(loads: list[tuple[int, int]], target: int, least: int, more: int) -> None:
    rules = Rules(deployment="d", target=target, least=least, most=least + more + 1, cooldown_s=20)
    stage = Stage(rules, replicas=least)
    last_out = -math.inf
    for work, coming in loads:
        before, at = stage.replicas, stage.now
        decision = stage.look(work, coming)
        assert rules.least <= stage.replicas <= rules.most
        assert stage.replicas >= wanted(rules, Seen(work, 0, coming)), "what the work of now asks for, it gets now"
        if stage.replicas > before:
            last_out = at
        if stage.replicas < before:
            assert at - last_out > rules.cooldown_s, "no flap within the cool-down"
        assert (decision.step == "stay") == (decision.replicas == before)
    assert len(stage.memory.wanted) <= rules.cooldown_s / TICK + 1, "memory does not grow"


# --------------------------------------------------------------------------------------------------- what is seen


def view(encode: int = 0) -> PipelineView:
    def replica(name: str, state: str = "ready", **load: float) -> ReplicaView:
        return ReplicaView(name, state, load=load)

    consumers = (ConsumerView("e0", 30, 0.1), ConsumerView("e1", 7, 0.1), ConsumerView("lost", 2, 99))
    engines = (replica("e0", held=30), replica("e1", "draining", held=7), replica("e2", "starting"))
    gateways = (replica("g0", requests=12), replica("g1", "draining", requests=5))
    return PipelineView(
        namespace="t",
        at=0,
        stages=(
            StageView("gateway", gateways, None),
            StageView("mm_encoder", (), QueueView("encode", encode, 0, None, None, (), 0)),
            StageView("engine", engines, QueueView("generate", 50, 39, 1, 1, consumers, 0)),
            StageView("postproc", (replica("p0", open=40),), None),
        ),
        shards=(),
        control_length=0,
        blobs=BlobsView(0, 0),
        redis=None,
    )


def test_what_a_leaving_replica_has_in_hand_asks_for_no_other() -> None:
    engine = observe(view(), "engine")
    assert engine.work == 50 - 7
    assert engine.held == {"e0": 30, "e1": 7, "lost": 2}


def test_work_of_the_encoder_is_coming_to_the_engine() -> None:
    assert observe(view(encode=3), "engine").seen(2) == Seen(43, 2, 3)
    assert observe(view(encode=3), "mm_encoder").seen(0) == Seen(3, 0, 0)


def test_stages_without_a_stream_say_what_they_hold() -> None:
    assert observe(view(), "gateway").seen(1) == Seen(12, 1, 0)
    assert observe(view(), "postproc").held == {"p0": 40}
