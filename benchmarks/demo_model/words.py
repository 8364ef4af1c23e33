"""Words and numbers to read."""

import random

from PIL import ImageDraw

from benchmarks.demo_model import draw
from benchmarks.demo_model.sample import Pixels, Sample, user

# Letters in words as English has them, so that a reader cannot guess the rest from a list.
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPQRSTVWXYZ" + "BCDFGLMNPRSTTRNS", "AEIOU" + "AEIO"
_WORDS = """
    A I AM AT BE BY DO GO HE IN IS IT ME MY NO OF ON OR SO TO UP US WE ACE ACT AGE AIR ALL AND ANT ANY ARM ART ASH ASK
    BAD BAG BAT BED BEE BIG BIN BOX BOY BUS CAN CAP CAR CAT COW CUP CUT DAY DOG DRY EAR EAT EGG END EYE FAN FAR FIG FLY
    FOG FOX FUN GAS HAT HEN HOT ICE INK JAM JAR JOB JOY KEY KIT LEG LID LIP LOG MAP MAN MUD NET NEW NOW NUT OAK OIL OLD
    ONE OUT OWL PAN PEN PIE PIG PIN POT RAT RED RUN SEA SKY SUN TAX TEA TEN TOP TOY VAN WAX WEB WIN YES ZOO BABY BALL
    BANK BEAR BELL BIRD BLUE BOAT BOOK BOOT CAFE CAKE CITY COAT COLD CORN DARK DEER DESK DOOR DUCK EAST EXIT FARM FIRE
    FISH FIVE FOOD FORK FOUR FROG GATE GOAT GOLD GRID HALF HAND HILL HOME IRON JAZZ JUMP KING KITE LAKE LAMP LEAF LION
    LOVE MILK MILL MOON NEST NINE NOSE NOTE OPEN OVEN PARK PINE PLUM POND QUIZ RACE RAIN RICE RING ROAD ROOF ROSE SALT
    SAND SHIP SHOE SNOW SOAP STAR STOP TAXI TENT TIME TREE WALL WEST WIND WOLF WOOD YARD ZERO APPLE BEACH BREAD BRICK
    CHAIR CLOCK CLOUD DANCE EAGLE EARTH EIGHT FIELD FLUTE FRUIT GLASS GRAPE GREEN HORSE HOTEL HOUSE JUICE KNIFE LEMON
    LIGHT MOUSE MUSIC NIGHT NORTH OCEAN ONION PAPER PIANO PLANE PLANT QUEEN RADIO RIVER ROBOT SEVEN SHEEP SMILE SOUTH
    SPOON STONE STORM SUGAR TABLE TIGER TRAIN TRUCK WATER WHALE WHEEL WORLD ZEBRA ANIMAL BASKET BOTTLE BRIDGE BUTTER
    CAMERA CANDLE CASTLE CHEESE CHERRY CIRCLE COFFEE DESERT DOCTOR DRAGON ENGINE FAMILY FLOWER FOREST FRIEND GARDEN
    GUITAR HAMMER ISLAND JACKET KITTEN LADDER LETTER MARKET MIRROR MONKEY NUMBER ORANGE OFFICE PENCIL PEPPER PIRATE
    PLANET POCKET POTATO PUZZLE RABBIT ROCKET SCHOOL SILVER SPIDER SPRING SQUARE STREET SUMMER TEMPLE TICKET TOMATO
    TUNNEL TURTLE VALLEY VIOLIN WINDOW WINTER YELLOW
"""
WORDS = _WORDS.split()
QUESTIONS = (
    "What does it say?",
    "Read the word.",
    "Which word is written here?",
    "What is written in the picture?",
    "Read the text.",
    "What word do you see?",
)


def word(rng: random.Random) -> str:
    """A word of one to six letters: half the time a real one, else a made-up one."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    letters = []
    vowel = rng.random() < 0.35
    for _ in range(rng.randint(2, 6)):
        letters.append(rng.choice(_VOWELS if vowel else _CONSONANTS))
        vowel = not vowel if rng.random() < 0.85 else vowel
    return "".join(letters)


def generate(rng: random.Random, size: draw.Size) -> Sample:
    """A picture of a word or a number, and the question what it says."""
    number = rng.random() < 0.25
    if number:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))
        asked = rng.choice(
            ("Which number is this?", "Read the number.", "What number do you see?", "What does it say?")
        )
        answer = f"The number is {text}."
    else:
        text = word(rng)
        asked = rng.choice(QUESTIONS)
        answer = f'It says "{text}".'
    spelled = f"The {'digits' if number else 'letters'} are {', '.join(text)}."
    return Sample("number" if number else "word", text, user(paint(rng, size, text), asked), answer, spelled)


def paint(rng: random.Random, size: draw.Size, text: str) -> Pixels:
    """The text in dark ink on light paper, or the other way round."""
    dark = rng.random() < 0.25
    image = draw.canvas(size, draw.background(rng, dark=float(dark)))
    ink = rng.choice(("yellow", "orange", "pink")) if dark else rng.choice(("black", "black", "red", "blue", "purple"))
    fill = (250, 250, 250) if dark and rng.random() < 0.5 else draw.shade(rng, ink)
    box = (8, 8, 2 * size[0] - 8, 2 * size[1] - 8)
    draw.write(ImageDraw.Draw(image), rng, text, box, fill)
    return draw.pixels(image)
