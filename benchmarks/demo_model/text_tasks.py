"""Small tasks on text: copy, list, sort, count, spell, translate a closed vocabulary."""

import random
from collections.abc import Callable

from benchmarks.demo_model.sample import Sample, user
from benchmarks.demo_model.tools import CITIES, NAMES, NOUNS

Asked = tuple[str, str, str, str]  # kind, question, reasoning, answer

# English: French, German, Spanish.
TRANSLATIONS = {
    "red": ("rouge", "rot", "rojo"),
    "green": ("vert", "grün", "verde"),
    "blue": ("bleu", "blau", "azul"),
    "yellow": ("jaune", "gelb", "amarillo"),
    "black": ("noir", "schwarz", "negro"),
    "white": ("blanc", "weiß", "blanco"),
    "water": ("eau", "Wasser", "agua"),
    "bread": ("pain", "Brot", "pan"),
    "milk": ("lait", "Milch", "leche"),
    "apple": ("pomme", "Apfel", "manzana"),
    "house": ("maison", "Haus", "casa"),
    "tree": ("arbre", "Baum", "árbol"),
    "dog": ("chien", "Hund", "perro"),
    "cat": ("chat", "Katze", "gato"),
    "horse": ("cheval", "Pferd", "caballo"),
    "bird": ("oiseau", "Vogel", "pájaro"),
    "fish": ("poisson", "Fisch", "pez"),
    "book": ("livre", "Buch", "libro"),
    "door": ("porte", "Tür", "puerta"),
    "table": ("table", "Tisch", "mesa"),
    "sun": ("soleil", "Sonne", "sol"),
    "moon": ("lune", "Mond", "luna"),
    "river": ("rivière", "Fluss", "río"),
    "sea": ("mer", "Meer", "mar"),
    "day": ("jour", "Tag", "día"),
    "night": ("nuit", "Nacht", "noche"),
    "friend": ("ami", "Freund", "amigo"),
    "city": ("ville", "Stadt", "ciudad"),
    "mill": ("moulin", "Mühle", "molino"),
    "wheel": ("roue", "Rad", "rueda"),
    "one": ("un", "eins", "uno"),
    "two": ("deux", "zwei", "dos"),
    "three": ("trois", "drei", "tres"),
    "four": ("quatre", "vier", "cuatro"),
    "five": ("cinq", "fünf", "cinco"),
    "six": ("six", "sechs", "seis"),
    "hello": ("bonjour", "hallo", "hola"),
    "thank you": ("merci", "danke", "gracias"),
    "yes": ("oui", "ja", "sí"),
    "no": ("non", "nein", "no"),
}
LANGUAGES = ("French", "German", "Spanish")


def generate(rng: random.Random) -> Sample:
    """A small task."""
    kind, asked, reasoning, answer = rng.choice(_TASKS)(rng)
    return Sample(kind, asked, user(asked), answer, reasoning)


def _words(rng: random.Random, count: int) -> list[str]:
    pool = NOUNS + [word for word in TRANSLATIONS if " " not in word] + [name.lower() for name in CITIES]
    return rng.sample(sorted(set(pool)), count)


def _copy(rng: random.Random) -> Asked:
    text = " ".join(_words(rng, rng.randint(2, 7)))
    if rng.random() < 0.3:
        text = " ".join(str(rng.randint(0, 9999)) for _ in range(rng.randint(1, 5)))
    asked = rng.choice(('Repeat: "{}"', 'Say "{}".', 'Copy this text: "{}"', 'Write "{}" again.')).format(text)
    return "copy", asked, "I only repeat the text.", text


def _reverse(rng: random.Random) -> Asked:
    words = _words(rng, rng.randint(2, 6))
    asked = rng.choice(("Reverse this list: {}", "Write in reverse order: {}")).format(", ".join(words))
    return "list", asked, f"There are {len(words)} words; I begin with the last.", ", ".join(reversed(words))


def _sort_numbers(rng: random.Random) -> Asked:
    numbers = rng.sample(range(100), rng.randint(2, 6))
    down = rng.random() < 0.4
    order = "from largest to smallest" if down else "from smallest to largest"
    asked = rng.choice(("Sort {1}: {0}", "Put these numbers in order {1}: {0}")).format(
        ", ".join(map(str, numbers)), order
    )
    ordered = sorted(numbers, reverse=down)
    return "sort", asked, f"By tens: {_by_tens(ordered, down)}.", ", ".join(map(str, ordered))


def _by_tens(ordered: list[int], down: bool) -> str:
    """Each of the tens with its numbers, empty ones too: a step of the scan never depends on the one before."""
    tens = range(9, -1, -1) if down else range(10)
    found = {ten: " ".join(str(n) for n in ordered if n // 10 == ten) for ten in tens}
    return ", ".join(f"{ten}: {numbers or 'none'}" for ten, numbers in found.items())


def _sort_words(rng: random.Random) -> Asked:
    words = rng.sample([name.lower() for name in NAMES], rng.randint(2, 5))
    asked = rng.choice(("Sort alphabetically: {}", "Put in alphabetical order: {}")).format(", ".join(words))
    initials = ", ".join(f"{word[0]}" for word in sorted(words))
    return "sort", asked, f"By first letters: {initials}.", ", ".join(sorted(words))


def _bullets(rng: random.Random) -> Asked:
    words = _words(rng, rng.randint(2, 5))
    asked = rng.choice(("Make a bulleted list of: {}", "Write as a bulleted list: {}")).format(", ".join(words))
    return "list", asked, f"One line for each of the {len(words)} words.", "\n".join(f"- {word}" for word in words)


def _numbered(rng: random.Random) -> Asked:
    words = _words(rng, rng.randint(2, 5))
    asked = f"Write as a numbered list: {', '.join(words)}"
    lines = "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    return "list", asked, f"One line for each of the {len(words)} words.", lines


def _count_words(rng: random.Random) -> Asked:
    words = _words(rng, rng.randint(2, 8))
    asked = rng.choice(("How many words are there: {}", "Count the words: {}")).format(" ".join(words))
    steps = ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    return "count words", asked, f"I count: {steps}.", f"There are {len(words)} words."


def _pick(rng: random.Random) -> Asked:
    words = _words(rng, rng.randint(3, 6))
    last = rng.random() < 0.5
    asked = f"What is the {'last' if last else 'first'} word of this list: {', '.join(words)}"
    return "list", asked, "I look at the end." if last else "I look at the beginning.", words[-1 if last else 0]


def _translate(rng: random.Random) -> Asked:
    word, language = rng.choice(sorted(TRANSLATIONS)), rng.randrange(3)
    forms = (
        'What is "{}" in {}?',
        'Translate "{}" into {}.',
        "How do you say {} in {}?",
        "What does {} mean in {}?",
        '"{}" in {}, please.',
        "Give me the {1} word for {0}.",
    )
    asked = rng.choice(forms).format(word, LANGUAGES[language])
    found = TRANSLATIONS[word][language]
    return "translate", asked, f"I know the {LANGUAGES[language]} word for {word}.", f'"{word}" is "{found}".'


_TASKS: tuple[Callable[[random.Random], Asked], ...] = (
    _copy,
    _copy,
    _reverse,
    _sort_numbers,
    _sort_numbers,
    _sort_words,
    _sort_words,
    _bullets,
    _numbered,
    _count_words,
    _pick,
    _translate,
    _translate,
)
