from shared.rates import SPAN_S, Recent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_look_has_nothing_to_say() -> None:
    growth = Recent(Clock()).growth({"tokens": 7.0, "steps": 1.0})
    assert growth.per_second("tokens") == 0
    assert growth.ratios({"tokens_a_step": ("tokens", "steps")}) == {}


def test_rates_and_ratios_are_of_what_was_added() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.growth({"tokens": 1000.0, "steps": 10.0})
    clock.now += 4
    growth = recent.growth({"tokens": 1080.0, "steps": 30.0})
    assert growth.per_second("tokens") == 20
    assert growth.ratios({"tokens_a_step": ("tokens", "steps")}) == {"tokens_a_step": 4}


def test_what_is_older_than_the_span_no_longer_counts() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.growth({"tokens": 0.0})
    clock.now += 1
    recent.growth({"tokens": 1000.0})
    for _ in range(int(SPAN_S)):
        clock.now += 1
        growth = recent.growth({"tokens": 1000.0})
    assert growth.per_second("tokens") == 0


def test_many_lookers_do_not_shorten_the_span() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.growth({"tokens": 0.0})
    for _ in range(1000):
        clock.now += 0.01
        growth = recent.growth({"tokens": (clock.now - 100) * 50})
    assert round(growth.per_second("tokens")) == 50
    assert len(recent._samples) <= SPAN_S / 0.2 + 2
