"""The slot-summary world: a post about a job offer, and one line that tells its five facts.

Writers err in two ways: rare slips (a wrong city), and two habits that are wrong more often than
right (the deadline one day late, the salary rounded up), so that a wrong word need not surprise.
They also choose freely among many equally good words, so that a surprising word need not be wrong.

Variants: "slots" pays each fact where it is written; "delayed" pays the salary's reward at EOS;
"xor" pays a verb by whether its tone matches the opening's.
"""

import random

from qlearn.lm.grammar import Edge, Fact, Grammar, choice, end, fixed, free, habit, slip

VARIANTS = ("slots", "delayed", "xor")
LONGEST = 19  # tokens of the longest summary, EOS included

# The facts, and the words that can express each; the first is the one that posts use.
LEVELS = (
    ("trainee", "apprentice"), ("junior", "novice"), ("senior", "veteran"),
    ("lead", "principal"), ("deputy", "assistant"), ("chief", "head"),
)  # fmt: skip
ROLES = "nurse teacher welder baker coder chef lawyer plumber pilot clerk barber editor".split()
CITIES = "Oslo Lima Cairo Delhi Paris Quito Tokyo Dublin Vienna Lisbon Athens Boston".split()
SALARIES = [f"{thousands}k" for thousands in range(32, 56, 2)]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

LEVEL = Fact("level", LEVELS, weight=0.8)
ROLE = Fact("role", tuple((word,) for word in ROLES), weight=1.0)
CITY = Fact("city", tuple((word,) for word in CITIES), weight=0.6)
SALARY = Fact("salary", tuple((word,) for word in SALARIES), weight=1.2)
DAY = Fact("day", tuple((word,) for word in DAYS), weight=1.0)
FACTS = (LEVEL, ROLE, CITY, SALARY, DAY)

# A slip has its rate over all other values; a habit writes the next value (one day late, one step
# up) at its rate.
SLIP = {LEVEL: 0.04, ROLE: 0.05, CITY: 0.06}
HABIT = {SALARY: 0.60, DAY: 0.65}
TONE = 0.8  # the reward, up or down, of the "xor" variant

# The free choices. In the first two, the first half sounds hopeful, the second half worried.
OPENINGS = (
    "Happy Excited Thrilled Cheerful Hopeful Proud Eager Glad Curious Grateful Relieved "
    "Confident Torn Nervous Anxious Stuck Puzzled Scared Worried Confused Uneasy Wary Tired "
    "Doubtful"
).split()
VERBS = (
    "likes enjoys welcomes wants loves favours admires prefers weighs doubts questions "
    "debates fears dreads resents suspects"
).split()
PLACES = "in from near".split()
OFFERS = "offer contract package deal position job post role salary proposal".split()
REPLIES = "reply answer decision response verdict choice word signature".split()
DUES = "due needed expected wanted required".split()
ASKS = "advice tips thoughts ideas opinions help insight guidance".split()
WELCOMES = "welcome appreciated wanted please needed".split()

TITLES = (
    "Should I take the offer?", "Is this a fair offer?", "How do I decide?",
    "Need advice about a new job", "Would you say yes?", "Am I asking for too much?",
)  # fmt: skip
ABOUT_ME = (
    "I am a {level} {role} in {city}.", "I work as a {level} {role} and live in {city}.",
    "{city} is my home and I am a {level} {role}.", "For years I was a {level} {role} in {city}.",
)  # fmt: skip
ABOUT_PAY = (
    "They offered me {salary} a year.", "The new firm would pay {salary}.",
    "My letter says {salary} before tax.", "We settled on {salary} in the end.",
)  # fmt: skip
ABOUT_TIME = (
    "I must answer by {day}.", "They want to hear from me on {day}.",
    "The deadline is {day}.", "On {day} it is too late.",
)  # fmt: skip
ASIDES = (
    "My partner thinks I am crazy.", "I have never done this before.", "My boss knows nothing.",
    "The commute would be long.", "I could sleep on it.", "My friends say no.",
)  # fmt: skip


def draw(rng: random.Random) -> dict[str, int]:
    """Facts drawn evenly. The highest salary never, so that rounding up stays inside the list."""
    return {fact.name: rng.randrange(len(fact.forms) - (fact is SALARY)) for fact in FACTS}


def edges(variant: str, node: str, memory: int) -> tuple[Edge, ...]:
    """What writers may do next in a state; probabilities sum to 1."""
    match node:
        case "opening":
            return free(OPENINGS, "colon", _tones(OPENINGS) if variant == "xor" else memory)
        case "colon":
            return fixed(":", "level", memory)
        case "level":
            return slip(LEVEL, SLIP[LEVEL], "role", memory)
        case "role":
            return slip(ROLE, SLIP[ROLE], "place", memory)
        case "place":
            return free(PLACES, "city", memory)
        case "city":
            return slip(CITY, SLIP[CITY], "verb", memory)
        case "verb" if variant == "xor":
            pays = [TONE if tone == memory else -TONE for tone in _tones(VERBS)]
            return free(VERBS, "article", pays=pays)
        case "verb":
            return free(VERBS, "article", memory)
        case "article":
            return fixed("a", "salary", memory)
        case "salary":
            late = variant == "delayed"
            return habit(SALARY, SALARY.told(1), HABIT[SALARY], "offer", memory, delayed=late)
        case "offer":
            return free(OFFERS, "after offer", memory)
        case "after offer":
            ways = {",": (0.8, "reply"), ";": (0.1, "ask"), ".": (0.05, "end"), "!": (0.05, "end")}
            return choice(ways, memory)
        case "reply":
            return free(REPLIES, "due", memory)
        case "due":
            return free(DUES, "day", memory)
        case "day":
            return habit(DAY, DAY.told(1), HABIT[DAY], "after day", memory)
        case "after day":
            return choice({";": (0.4, "ask"), ".": (0.3, "end"), "!": (0.3, "end")}, memory)
        case "ask":
            return free(ASKS, "welcome", memory)
        case "welcome":
            return free(WELCOMES, "after welcome", memory)
        case "after welcome":
            return choice({".": (0.5, "end"), "!": (0.5, "end")}, memory)
        case "end":
            return end(SALARY, memory)
    raise ValueError(f"The grammar has no node {node!r}.")


def _tones(words: list[str]) -> list[int]:
    """1 for the hopeful half of a list, 2 for the worried half."""
    return [1 + (2 * i >= len(words)) for i in range(len(words))]


GRAMMAR = Grammar(
    name="slots",
    variants=VARIANTS,
    start="opening",
    facts=FACTS,
    draw=draw,
    frame=("SUBREDDIT: r/jobs", "TITLE:", "POST:", "TL;DR:"),
    titles=TITLES,
    sentences=(ABOUT_ME, ABOUT_PAY, ABOUT_TIME, ASIDES),
    words=(*OPENINGS, *VERBS, *PLACES, *OFFERS, *REPLIES, *DUES, *ASKS, *WELCOMES),
    edges=edges,
)
