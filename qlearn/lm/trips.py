"""The trip world: a letter to a booking desk, and one line that tells its seven facts.

The second world, made before any model was trained on it, to see whether what holds in the
slot-summary world holds elsewhere. Nothing is shared but the machinery. Its writers have three
habits. They swap the pair of places, which is two wrong words, the second likely once the first
stands but not certain. They round the price down. And they take the unit for another one. Their
slips go to neighbours in a list, never far away, so some wrong values they never write. Month and
price may be left out, and up to three wishes, which pay nothing, may end a line.

Variants: "trips" pays each fact where it is written; "trips-delayed" pays the price's at EOS.
"""

import random

from qlearn.lm.grammar import Edge, Fact, Grammar, choice, end, fixed, free, habit, slip

VARIANTS = ("trips", "trips-delayed")

# The facts. Neighbours in a list are what a hasty reader takes for one another.
PARTIES = (
    ("retirees", "pensioners"), ("colleagues", "coworkers"), ("friends", "mates"),
    ("newlyweds", "honeymooners"), ("cousins", "relatives"), ("students", "pupils"),
    ("singers", "choristers"), ("players", "teammates"),
)  # fmt: skip
MEANS = "train coach bus van car motorbike ferry boat ship plane".split()
PLACES = (
    "Rome Berlin Madrid Prague Warsaw Geneva Venice Porto Bergen Malaga Zurich Seville Dresden "
    "Krakow"
).split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
PRICES = [str(price) for price in range(120, 480, 30)]
UNITS = "euros dollars pounds francs crowns pesos".split()

PARTY = Fact("party", PARTIES, weight=0.7)
MEAN = Fact("means", tuple((word,) for word in MEANS), weight=0.9)
ORIGIN = Fact("origin", tuple((word,) for word in PLACES), weight=0.8)
GOAL = Fact("goal", tuple((word,) for word in PLACES), weight=0.8)
MONTH = Fact("month", tuple((word,) for word in MONTHS), weight=0.8)
PRICE = Fact("price", tuple((word,) for word in PRICES), weight=1.1)
UNIT = Fact("unit", tuple((word,) for word in UNITS), weight=0.9)
FACTS = (PARTY, MEAN, ORIGIN, GOAL, MONTH, PRICE, UNIT)

SLIP = {PARTY: 0.06, MEAN: 0.07, GOAL: 0.08, MONTH: 0.06}
NEAR = (1, -1)  # a slip is one step off, up or down
SWAP, SWAPPED = 0.58, 1  # how often the goal stands at the origin's place; what remembers it
FOLLOW = 0.75  # how often the origin then stands at the goal's place
ROUND, MISTAKE = 0.62, 0.56  # one step down; the next unit of the list

MOODS = (
    "Sunny Quick Simple Cheap Fancy Big Small Busy Quiet Early Late Rushed Calm Bold Odd Nice "
    "Tricky Classic Lazy Brisk"
).split()
NOUNS = "trip journey outing tour voyage getaway holiday break".split()
LIMITS = "under below within around roughly maximum".split()
COMFORTS = "quiet cheap large clean cosy sunny warm soft bright simple fresh calm".split()
THINGS = "rooms seats beds cabins tables windows terraces gardens lounges sofas".split()

TITLES = (
    "Can you book this for us?", "Help with a journey", "Our plans for the year",
    "Is this still possible?", "One more request", "We need a hand",
)  # fmt: skip
ABOUT_US = (
    "We are {party} with little time.", "I write for some {party}.",
    "You know us, the {party} of last year.", "This is for {party} who never travel.",
)  # fmt: skip
ABOUT_WAY = (
    "The {means} suits us best.", "We would love to take the {means}.",
    "Please find a {means} that is not full.", "No other way than by {means}, please.",
)  # fmt: skip
ABOUT_ROUTE = (
    "We live in {origin} and dream of {goal}.", "Bring us from {origin} to {goal}.",
    "{goal} is where we want to be, {origin} is where we start.",
    "It should begin in {origin} and end in {goal}.",
)  # fmt: skip
ABOUT_TIME = (
    "We are free in {month}.", "{month} would be perfect.", "It has to be {month}.",
    "Nobody works in {month}.",
)  # fmt: skip
ABOUT_MONEY = (
    "We can pay {price} {unit} each.", "Our limit is {price} {unit}.",
    "We saved {price} {unit} for it.", "It may cost {price} {unit} in all.",
)  # fmt: skip
ASIDES = (
    "One of us snores.", "The last journey was a mess.", "We trust your taste.",
    "There may be a dog.", "", "",
)  # fmt: skip


def draw(rng: random.Random) -> dict[str, int]:
    """Facts drawn evenly, the two places apart; the lowest price never, so it can be rounded."""
    facts = {fact.name: rng.randrange(fact is PRICE, len(fact.forms)) for fact in FACTS}
    apart = rng.randrange(1, len(PLACES))
    return facts | {"goal": (facts["origin"] + apart) % len(PLACES)}


def edges(variant: str, node: str, memory: int) -> tuple[Edge, ...]:
    """What writers may do next in a state; probabilities sum to 1."""
    match node:
        case "mood":
            return free(MOODS, "noun")
        case "noun":
            return free(NOUNS, "for")
        case "for":
            return fixed("for", "party")
        case "party":
            return slip(PARTY, SLIP[PARTY], "by", offsets=NEAR)
        case "by":
            return fixed("by", "means")
        case "means":
            return slip(MEAN, SLIP[MEAN], "from", offsets=NEAR)
        case "from":
            return fixed("from", "origin")
        case "origin":
            return habit(ORIGIN, GOAL.told(), SWAP, "to", memory=(0, SWAPPED))
        case "to":
            return fixed("to", "goal", memory)
        case "goal" if memory == SWAPPED:
            return habit(GOAL, ORIGIN.told(), FOLLOW, "after goal")
        case "goal":
            return slip(GOAL, SLIP[GOAL], "after goal", offsets=NEAR)
    return _ending(variant, node, memory)


def _ending(variant: str, node: str, memory: int) -> tuple[Edge, ...]:
    """After the places: the month, the price and the wishes, each of which may be left out."""
    match node:
        case "after goal":
            return choice({
                "in": (0.60, "month"), ",": (0.25, "limit"), ";": (0.05, "comfort 1"),
                ".": (0.05, "end"), "!": (0.05, "end"),
            })  # fmt: skip
        case "month":
            return slip(MONTH, SLIP[MONTH], "after month", offsets=NEAR)
        case "after month":
            return choice({
                ",": (0.70, "limit"), ";": (0.15, "comfort 1"),
                ".": (0.08, "end"), "!": (0.07, "end"),
            })  # fmt: skip
        case "limit":
            return free(LIMITS, "price")
        case "price":
            late = variant == "trips-delayed"
            return habit(PRICE, PRICE.told(-1), ROUND, "unit", delayed=late)
        case "unit":
            return habit(UNIT, UNIT.told(1), MISTAKE, "after unit", memory)
        case "after unit":
            ways = {";": (0.5, "comfort 1"), ".": (0.25, "end"), "!": (0.25, "end")}
            return choice(ways, memory)
        case "comfort 1" | "comfort 2" | "comfort 3":
            return free(COMFORTS, f"thing {node[-1]}", memory)
        case "thing 1" | "thing 2" | "thing 3":
            return free(THINGS, f"after thing {node[-1]}", memory)
        case "after thing 1" | "after thing 2":
            more = f"comfort {int(node[-1]) + 1}"
            return choice({"and": (0.45, more), ".": (0.30, "end"), "!": (0.25, "end")}, memory)
        case "after thing 3":
            return choice({".": (0.5, "end"), "!": (0.5, "end")}, memory)
        case "end":
            return end(PRICE, memory)
    raise ValueError(f"The grammar has no node {node!r}.")


GRAMMAR = Grammar(
    name="trips",
    variants=VARIANTS,
    start="mood",
    facts=FACTS,
    draw=draw,
    frame=("TO: booking desk", "SUBJECT:", "MESSAGE:", "NOTE:"),
    titles=TITLES,
    sentences=(ABOUT_US, ABOUT_WAY, ABOUT_ROUTE, ABOUT_TIME, ABOUT_MONEY, ASIDES),
    words=(*MOODS, *NOUNS, *LIMITS, *COMFORTS, *THINGS, "for", "by", "from", "to", "in", "and"),
    edges=edges,
)
