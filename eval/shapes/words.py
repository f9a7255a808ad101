"""The language of the moving shapes: every phrase that `describe` writes and `judge` parses.

The first of several phrases with one meaning is the plain one.

    sentence = [connective] (name | "it") predicate
             | [connective] name predicate-with name
             | [connective] name "and" name predicate-of-two
"""

from eval.shapes.world import COLOURS, DIRECTIONS, TURNS, Fact

MOVES = ("moves", "slides", "glides")
DIRECTION_PHRASES = {
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
SPINS = ("turns", "rotates", "spins")
BECOMES = ("becomes", "turns", "changes to")
SIMPLE = {
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "appear": ("appears", "fades in", "shows up"),
    "disappear": ("disappears", "fades out", "vanishes"),
    "jump": ("jumps", "hops", "jumps up and down"),
}
OF_TWO = {  # after "the red circle and the blue square"
    "collide": ("collide", "bump into each other", "run into each other"),
    "swap": ("swap places", "trade places", "switch places"),
}
WITH = {  # after "the red circle", before "the blue square"
    "collide": ("collides with", "bumps into", "runs into"),
    "swap": ("swaps places with", "trades places with", "switches places with"),
}
FIRST = ("", "First, ")
NEXT = ("Then ", "Next, ", "After that, ", "")
LAST = ("Finally, ", "Then ", "At the end, ")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
JOINED = ("and then", "and")  # a second event in the same sentence


def predicates(verb: str, detail: str) -> list[str]:
    """Returns the predicates of one shape."""
    if verb == "move":
        return [f"{move} {way}" for move in MOVES for way in DIRECTION_PHRASES[detail]]
    if verb == "turn":
        return [f"{spin} {detail}" for spin in SPINS]
    if verb == "recolour":
        return [f"{become} {detail}" for become in BECOMES]
    return list(SIMPLE[verb])


def phrasings(fact: Fact, a: str, b: str = "") -> list[str]:
    """Returns all phrasings of a fact about the shape `a`, or about `a` and `b`, in lower case without a period."""
    if not b:
        return [f"{a} {predicate}" for predicate in predicates(fact.verb, fact.detail)]
    return [f"{a} and {b} {p}" for p in OF_TWO[fact.verb]] + [f"{a} {p} {b}" for p in WITH[fact.verb]]


def article(name: str) -> str:
    """Returns the name with "a" or "an"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def clause(fact: Fact, definite: bool = True) -> str:
    """Returns the plain phrasing of a fact: "the red circle moves to the left"."""
    names = [f"the {name}" if definite else article(name) for name in fact.names]
    return phrasings(fact, *names)[0]


def plain(fact: Fact, definite: bool = True) -> str:
    """Returns the canonical sentence of a fact, "The red circle moves to the left."."""
    return as_sentence(clause(fact, definite))


def as_sentence(text: str) -> str:
    """Adds a capital and a period."""
    return f"{text[0].upper()}{text[1:]}."


def name_after(fact: Fact) -> str:
    """Returns the name of the event's shape after the event."""
    return f"{fact.detail} {fact.names[0].split()[1]}" if fact.verb == "recolour" else fact.names[0]


ALONE = {  # per predicate of one shape, its verb and detail
    predicate: (verb, detail)
    for verb, details in (
        ("move", DIRECTIONS),
        ("turn", TURNS),
        ("recolour", tuple(COLOURS)),
        *((verb, ("",)) for verb in SIMPLE),
    )
    for detail in details
    for predicate in predicates(verb, detail)
}
