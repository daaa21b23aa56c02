"""Hold the facts of an invented world and the phrasings in which they can be told or asked.

The words and phrasings stand in world.json. Nothing here is random at run time: who lives where is drawn once from
WORLD_SEED, so that every split of the corpus talks about the same people, cities, rivers, lands and animals.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD_SEED = 20
POPULATION = 64

_SOURCE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
WORDS: dict[str, list[str]] = _SOURCE["words"]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Describe one kind of fact; `{s}` stands for the subject, `{v}` for the value.

    `predicate` completes a sentence that starts with the subject (or a pronoun); `statements` and `questions` name
    the subject themselves. Under a `one_to_one` relation no two subjects share a value.
    """

    kind: str
    name: str
    predicate: str
    values: Sequence[str]
    one_to_one: bool
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Tie a subject to its value under a relation."""

    relation: Relation
    subject: str
    value: str

    def predicate(self, value: str | None = None) -> str:
        """Return the sentence part after the subject, for this fact's value or another one."""
        return self.relation.predicate.format(v=value or self.value)

    def sentence(self, subject: str | None = None) -> str:
        """Return the plain sentence, optionally with a pronoun as its subject."""
        return capitalise(f"{subject or self.subject} {self.predicate()}.")

    def fill(self, template: str) -> str:
        """Return a statement or question of the relation with subject and value put in."""
        return capitalise(template.format(s=self.subject, v=self.value))


def capitalise(text: str) -> str:
    """Return the text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def _people() -> list[str]:
    pairs = [f"{given} {surname}" for given in WORDS["given_names"] for surname in WORDS["surnames"]]
    return sorted(random.Random(f"people:{WORLD_SEED}").sample(pairs, POPULATION))


PEOPLE = _people()
CITIES = WORDS["cities"]
SUBJECTS: dict[str, Sequence[str]] = {
    "person": PEOPLE,
    "city": CITIES,
    "river": WORDS["rivers"],
    "land": WORDS["lands"],
    "animal": [f"the {animal}" for animal in WORDS["animals"]],
}


def _relation(entry: dict[str, Any]) -> Relation:
    values = {"people": PEOPLE} | WORDS
    return Relation(
        kind=entry["kind"],
        name=entry["name"],
        predicate=entry["predicate"],
        values=values[entry["values"]],
        one_to_one=entry["one_to_one"],
        statements=tuple(entry["statements"]),
        questions=tuple(entry["questions"]),
    )


RELATIONS = tuple(_relation(entry) for entry in _SOURCE["relations"])


def _draw_values(relation: Relation) -> list[str]:
    """Draw one value per subject, each value about equally often."""
    rng = random.Random(f"{relation.kind}.{relation.name}:{WORLD_SEED}")
    subjects = SUBJECTS[relation.kind]
    if relation.name == "friend":
        return _friends(rng)
    if relation.one_to_one:
        return rng.sample(list(relation.values), len(subjects))
    rounds = -(-len(subjects) // len(relation.values))
    values = list(relation.values) * rounds
    rng.shuffle(values)
    return values[: len(subjects)]


def _friends(rng: random.Random) -> list[str]:
    """Pair the people off, so that friendship is mutual. Returns one name per entry of PEOPLE."""
    order = rng.sample(PEOPLE, len(PEOPLE))
    friend = dict(zip(order[::2], order[1::2], strict=True))
    friend |= {b: a for a, b in friend.items()}
    return [friend[name] for name in PEOPLE]


def _facts() -> dict[tuple[str, str], Fact]:
    """Draw every fact, by (relation name, subject). A capital must lie in its land, so those follow from the cities."""
    facts: dict[tuple[str, str], Fact] = {}
    for relation in RELATIONS:
        values = _draw_values(relation)
        if relation.name == "capital":
            values = [next(city for city in CITIES if facts["land", city].value == land) for land in SUBJECTS["land"]]
        for subject, value in zip(SUBJECTS[relation.kind], values, strict=True):
            facts[relation.name, subject] = Fact(relation=relation, subject=subject, value=value)
    return facts


FACTS = _facts()


def pick(rng: random.Random, words: str) -> str:
    """Draw one word (or phrase) from the named list of world.json."""
    return rng.choice(WORDS[words])


def facts_about(subject: str) -> list[Fact]:
    """Return every fact whose subject this is, in the order of RELATIONS."""
    return [fact for (_, name), fact in FACTS.items() if name == subject]


def pronoun(person: str) -> str:
    """Return "she" or "he"; fixed by the given name, and alternating over the list of given names."""
    return "he" if WORDS["given_names"].index(person.split(maxsplit=1)[0]) % 2 else "she"
