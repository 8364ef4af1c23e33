"""Rotary embedding of a config.json: its base, and the frequencies that follow time."""

from shared.model.config_file import RopeFields, TextFields, agreed, agreed_or_warn, require

# Default sections of a 128-wide head: transformers' default, and the hub's by its freq_allocation.
_PUBLISHED_HEAD_DIM, _PUBLISHED_SECTIONS = 128, (22, 22, 20)
# Names of the only rotary embedding. The sections, not the name, tell that positions have three axes.
_ROPE_TYPES = ("default", "mrope", "ernie_3d")


def rope_fields(text: TextFields) -> dict[str, RopeFields]:
    """Return the objects that describe the rotary embedding, by the name of their field."""
    given = {"rope_parameters": text.rope_parameters, "rope_scaling": text.rope_scaling}
    ropes = {name: rope for name, rope in given.items() if rope is not None}
    for name, rope in ropes.items():
        for field, kind in ("rope_type", rope.rope_type), ("type", rope.type):
            require(
                kind is None or kind in _ROPE_TYPES,
                f"{name}.{field} is {kind!r}; only {', '.join(_ROPE_TYPES)} are supported",
            )
        for field, factor in ("factor", rope.factor), ("partial_rotary_factor", rope.partial_rotary_factor):
            require(factor in (None, 1.0), f"{name}.{field} is {factor}; only 1 is supported")
    return ropes


def rope_theta(text: TextFields, ropes: dict[str, RopeFields]) -> float:
    """Return the base of the rotary frequencies."""
    places = {"rope_theta": text.rope_theta, "rope_parameters.rope_theta": None}
    return agreed(places | {f"{name}.rope_theta": rope.rope_theta for name, rope in ropes.items()})


def time_freqs(text: TextFields, ropes: dict[str, RopeFields], head_dim: int, nested: bool, warnings: list[str]) -> int:
    """Return the number of the head_dim / 2 frequencies that follow time; height and width share the rest evenly."""
    freqs = head_dim // 2
    places = {"freq_allocation": text.freq_allocation}
    for name, rope in ropes.items():
        places[f"{name}.freq_allocation"] = rope.freq_allocation
        if rope.mrope_section is not None:
            places[f"{name}.mrope_section[2]"] = _section_of_time(name, rope.mrope_section, freqs)
    published = head_dim == _PUBLISHED_HEAD_DIM
    if nested and published and not any(rope.mrope_section for rope in ropes.values()):
        places["rope_parameters.mrope_section[2]"] = _PUBLISHED_SECTIONS[2]
    time = agreed_or_warn(places, _PUBLISHED_SECTIONS[2], warnings) if published else agreed(places)
    require(
        time < freqs and (freqs - time) % 2 == 0,
        f"freq_allocation {time} of {freqs} frequencies leaves none, or an odd number, for height and width",
    )
    return time


def _section_of_time(name: str, sections: tuple[int, int, int], freqs: int) -> int:
    height, width, time = sections
    where = f"{name}.mrope_section {list(sections)}"
    require(sum(sections) == freqs, f"{where} does not add up to head_dim / 2, which is {freqs}")
    require(height == width, f"{where} gives height and width different numbers of frequencies")
    return time
