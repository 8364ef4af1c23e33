"""Text from elsewhere, a checkpoint's or a replica's for one, as it may be printed on a terminal."""


def visible(text: str) -> str:
    """Escape what UTF-8 cannot encode and what a terminal would act on, line ends among it."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def visible_lines(text: str) -> str:
    """Escape the same in each line of a text."""
    return "\n".join(map(visible, text.split("\n")))
