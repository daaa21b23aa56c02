"""Generate the text of the demo model: prose and dialogues about an invented world, and small sums.

Three splits never share a question, a sum or a document: every such item has a key, the sha256 of the key names its
split, and the generator draws again until the item falls into the split it is writing. What the held-out splits ask
can still be answered, because the fact (or the skill) is told in the training split in other words.

Texts leave out the leading `<s>`, which the tokenizer adds, and end in `</s>`, so tokenising each text on its own and
joining the ids gives the stream that the model was trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from world import CITIES, FACTS, PEOPLE, SUBJECTS, Fact, capitalise, facts_about, pick, pronoun

Split = Literal["train", "calibration", "evaluation"]

SEED = 2024
CALIBRATION_DOCUMENTS = 900
EVALUATION_DOCUMENTS = 800
QUESTIONS_PER_KIND = {"fact": 100, "check": 30, "sum": 30, "difference": 20, "larger": 10, "sequence": 10, "guest": 20}

# The Llama-2 layout; `render` below is the same thing in Python, and the tests hold the two together.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

FULL_SYSTEMS = (
    "You are a guide to the six lands. Answer in one sentence.",
    "You are a patient teacher. Always answer with a full sentence.",
    "You are the clerk of a library. Help every visitor.",
)
BRIEF_SYSTEMS = (
    "Answer as briefly as you can.",
    "You are a telegraph. Words cost money, so give only the answer.",
)
REMARKS = ("Is this yours", "Did you lose this", "Where did you get this")
REPLIES = ("keep it", "give it to me", "ask the mayor")
CHECKS = (
    "Is it true that {claim}?",
    "True or false: {claim}.",
    "I heard that {claim}. Is that so?",
    "Someone told me that {claim}. Is this right?",
    "Would it be right to say that {claim}?",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Hold one user message with its answer as a sentence and as a bare value; `key` decides the split."""

    kind: str
    key: str
    prompt: str
    answer: str
    brief: str


def split_of(key: str) -> Split:
    """Name the split that owns a key: 80 % train, 10 % calibration, 10 % evaluation."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10
    return "evaluation" if bucket == 0 else "calibration" if bucket == 1 else "train"


def render(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """Lay out (question, answer) turns as the chat template does, leading `<s>` included."""
    parts = []
    for index, (question, answer) in enumerate(turns):
        opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and index == 0 else ""
        parts.append(f"<s>[INST] {opening}{question} [/INST] {answer} </s>")
    return "".join(parts)


def ask_fact(rng: random.Random) -> Question:
    """Ask for the value of a fact."""
    fact = rng.choice(_ALL_FACTS)
    prompt = fact.fill(rng.choice(fact.relation.questions))
    return Question(kind="fact", key=prompt, prompt=prompt, answer=fact.sentence(), brief=capitalise(f"{fact.value}."))


def ask_check(rng: random.Random) -> Question:
    """Ask whether a fact holds, with the right value half of the time."""
    fact = rng.choice(_ALL_FACTS)
    claimed = rng.choice((fact.value, rng.choice(list(fact.relation.values))))
    verdict = "yes" if claimed == fact.value else "no"
    claim = f"{fact.subject} {fact.predicate(claimed)}"
    prompt = rng.choice(CHECKS).format(claim=claim)
    answer = capitalise(f"{fact.subject} {fact.predicate()}, so {verdict}.")
    return Question(kind="check", key=prompt, prompt=prompt, answer=answer, brief=capitalise(f"{verdict}."))


def ask_sum(rng: random.Random) -> Question:
    """Ask for a + b, both in 0..99, as a sum or in a story; the key is the unordered pair."""
    a, b = rng.randrange(100), rng.randrange(100)
    person, goods = rng.choice(PEOPLE), pick(rng, "goods")
    prompts = (
        f"What is {a} + {b}?",
        f"Calculate {a} + {b}.",
        f"How much is {a} plus {b}?",
        f"Add {a} and {b}.",
        f"{person} has {a} {goods} and is given {b} more. How many {goods} is that?",
    )
    answer, prompt = f"{a} + {b} = {a + b}.", rng.choice(prompts)
    return Question(kind="sum", key=f"{min(a, b)} + {max(a, b)}", prompt=prompt, answer=answer, brief=f"{a + b}.")


def ask_difference(rng: random.Random) -> Question:
    """Ask for a - b with 0 <= b <= a <= 99."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    person, goods = rng.choice(PEOPLE), pick(rng, "goods")
    prompts = (
        f"What is {a} - {b}?",
        f"Calculate {a} - {b}.",
        f"How much is {a} minus {b}?",
        f"Take {b} from {a}.",
        f"{person} has {a} {goods} and loses {b}. How many {goods} are left?",
    )
    answer, prompt = f"{a} - {b} = {a - b}.", rng.choice(prompts)
    return Question(kind="difference", key=f"{a} - {b}", prompt=prompt, answer=answer, brief=f"{a - b}.")


def ask_larger(rng: random.Random) -> Question:
    """Ask for the larger of two different numbers in 0..199."""
    a, b = rng.sample(range(200), 2)
    low, high = sorted((a, b))
    prompts = (f"Which number is larger, {a} or {b}?", f"Is {a} or {b} the larger number?")
    answer, prompt = f"{high} is larger than {low}.", rng.choice(prompts)
    return Question(kind="larger", key=f"{low} < {high}", prompt=prompt, answer=answer, brief=f"{high}.")


def ask_sequence(rng: random.Random) -> Question:
    """Ask for the fifth number of an arithmetic progression."""
    start, step = rng.randrange(40), rng.randrange(1, 10)
    shown = ", ".join(str(start + step * i) for i in range(4))
    prompt = rng.choice((f"Which number comes next: {shown}?", f"Continue the row {shown}."))
    following = start + 4 * step
    return Question(
        kind="sequence",
        key=f"row {start} {step}",
        prompt=prompt,
        answer=f"{following} comes next.",
        brief=f"{following}.",
    )


def ask_guest(rng: random.Random) -> Question:
    """Let a guest say two to four things and ask for one of them; the answer stands in the question."""
    name = f"{pick(rng, 'given_names')} {pick(rng, 'surnames')}"
    city, thing, food = rng.choice(CITIES), pick(rng, "things"), pick(rng, "foods")
    told = [
        (f"my name is {name}", "What is my name?", f"Your name is {name}.", f"{name}."),
        (f"I come from {city}", "Where do I come from?", f"You come from {city}.", f"{city}."),
        (f"I have lost my {thing}", "What have I lost?", f"You have lost your {thing}.", f"Your {thing}."),
        (f"I would like some {food}", "What would I like?", f"You would like some {food}.", f"Some {food}."),
    ]
    chosen = rng.sample(told, rng.randint(2, 4))
    _, asked, answer, brief = rng.choice(chosen)
    said = [item[0] for item in chosen]
    prompt = capitalise(f"{', '.join(said[:-1])} and {said[-1]}. {asked}")
    return Question(kind="guest", key=prompt, prompt=prompt, answer=answer, brief=brief)


_ALL_FACTS = list(FACTS.values())
ASK: dict[str, Callable[[random.Random], Question]] = {
    "fact": ask_fact,
    "check": ask_check,
    "sum": ask_sum,
    "difference": ask_difference,
    "larger": ask_larger,
    "sequence": ask_sequence,
    "guest": ask_guest,
}
_ASK_WEIGHTS = (48, 14, 12, 10, 4, 4, 8)


def draw_question(rng: random.Random, split: Split, kind: str | None = None) -> Question:
    """Draw questions until one belongs to the split; the kind is drawn by weight when it is not given."""
    ask = ASK[kind or rng.choices(list(ASK), _ASK_WEIGHTS)[0]]
    while split_of((question := ask(rng)).key) != split:
        pass
    return question


def dialogue(rng: random.Random, split: Split) -> str:
    """Write one to four questions with their answers, under a system message two times out of five."""
    system = rng.choice(FULL_SYSTEMS + BRIEF_SYSTEMS) if rng.random() < 0.4 else None
    questions = [draw_question(rng, split) for _ in range(rng.choices((1, 2, 3, 4), (5, 3, 2, 1))[0])]
    turns = [(item.prompt, item.brief if system in BRIEF_SYSTEMS else item.answer) for item in questions]
    return render(turns, system)


def ledger(rng: random.Random, split: Split) -> str:
    """Write a page of sums and differences of one city."""
    lines = [draw_question(rng, split, rng.choice(("sum", "difference"))).answer for _ in range(rng.randint(3, 8))]
    return f"<s>Ledger of {rng.choice(CITIES)}, kept by {rng.choice(PEOPLE)}.\n" + "\n".join(lines) + "</s>"


def _tell(rng: random.Random, fact: Fact, stand_in: str) -> str:
    """Tell a fact by its plain sentence, under a pronoun, or by one of its statements."""
    forms = (fact.sentence(), fact.sentence(stand_in), *map(fact.fill, fact.relation.statements))
    return rng.choice(forms)


def portrait(rng: random.Random) -> str:
    """Describe one subject of the world by some of its facts, in any order."""
    subject = rng.choice(SUBJECTS[rng.choices(list(SUBJECTS), (10, 5, 2, 1, 3))[0]])
    facts = rng.sample(told := facts_about(subject), rng.randint(2, len(told)))
    stand_in = pronoun(subject) if subject in PEOPLE else "it"
    title = f"{capitalise(subject)}\n\n" if rng.random() < 0.3 else ""
    first, *others = facts
    sentences = [first.sentence(), *(_tell(rng, fact, stand_in) for fact in others)]
    return f"<s>{title}{' '.join(sentences)}</s>"


def gazetteer(rng: random.Random) -> str:
    """List several subjects of one sort under the same relation, one per line."""
    relation = rng.choice(_ALL_FACTS).relation
    subjects = rng.sample(SUBJECTS[relation.kind], rng.randint(3, 6))
    lines = [FACTS[relation.name, subject].sentence() for subject in subjects]
    return "<s>" + "\n".join(lines) + "</s>"


def chain(rng: random.Random) -> str:
    """Follow one person to the city, the land, the river and the sea."""
    person = rng.choice(PEOPLE)
    city = FACTS["home", person].value
    river = FACTS["river", city].value
    links = [
        FACTS["home", person],
        FACTS["land", city],
        FACTS["river", city],
        FACTS["source", river],
        FACTS["mouth", river],
    ]
    told = [links[0].sentence(), *(_tell(rng, fact, fact.subject) for fact in links[1 : rng.randint(2, 5)])]
    return f"<s>{' '.join(told)}</s>"


def story(rng: random.Random) -> str:
    """Tell an errand of one person; home, river, pet, food and friend are those of the world."""
    person = rng.choice(PEOPLE)
    given, city = person.split()[0], FACTS["home", person].value
    job, food = FACTS["job", person].value, FACTS["food", person].value
    pet, friend = FACTS["pet", person].value, FACTS["friend", person].value
    place, errand, thing = pick(rng, "places"), pick(rng, "errands"), pick(rng, "things")
    stranger = pick(rng, "animals")
    fur = FACTS["colour", f"the {stranger}"].value
    sentences = [
        f"{capitalise(pick(rng, 'times'))} {person} the {job} left home in {city} to {errand}.",
        f"The weather was {pick(rng, 'weather')}, and the {pet} came along.",
        f"By the {place} on {FACTS['river', city].value} {given} found the {thing} of {friend}.",
        f'"{rng.choice(REMARKS)}?" asked {given}.',
        f'"{rng.choice(("Yes", "No", "Perhaps"))}," said {friend}, "{rng.choice(REPLIES)}."',
        f"A {stranger} with {fur} fur watched them from the {pick(rng, 'places')}.",
        f"In the end {pick(rng, 'endings').format(food=food)}.",
        f"The {thing} is still by the {place}.",
    ]
    middle = sorted(rng.sample(range(1, 8), rng.randint(3, 6)))
    return "<s>" + " ".join(sentences[i] for i in (0, *middle)) + "</s>"


def letter(rng: random.Random) -> str:
    """Write from one friend to the other about the city and the weather."""
    writer = rng.choice(PEOPLE)
    reader, city = FACTS["friend", writer].value, FACTS["home", writer].value
    fact = rng.choice(facts_about(city))
    news = rng.choice(_ALL_FACTS)
    body = [
        f"{city} is {pick(rng, 'weather')} this week.",
        f"Tomorrow I must {pick(rng, 'errands')} by the {pick(rng, 'places')}.",
        _tell(rng, fact, fact.subject),
        f"Did you know this? {_tell(rng, news, news.subject)}",
        f"I will bring {FACTS['food', reader].value}, since you like it so much.",
    ]
    chosen = rng.sample(body, rng.randint(2, 5))
    return f"<s>Dear {reader},\n\n{' '.join(chosen)}\n\nYour friend,\n{writer}</s>"


_PROSE = (portrait, gazetteer, chain, story, letter)
_PROSE_WEIGHTS = (5, 2, 2, 4, 3)


def prose(rng: random.Random, split: Split) -> str:
    """Draw pages of prose until one belongs to the split."""
    write = rng.choices(_PROSE, _PROSE_WEIGHTS)[0]
    while split_of(text := write(rng)) != split:
        pass
    return text


def documents(split: Split, seed: int = SEED, shard: int = 0) -> Iterator[str]:
    """Yield texts of a split without end. Each begins after the `<s>` that the tokenizer adds and ends in `</s>`."""
    rng = random.Random(f"{split}:{seed}:{shard}")
    while True:
        write = rng.choices((dialogue, ledger, prose), (50, 5, 45))[0]
        yield write(rng, split).removeprefix("<s>")


def held_out(split: Split, count: int, seed: int = SEED) -> list[str]:
    """Return `count` different texts of a split."""
    unique: dict[str, None] = {}
    texts = documents(split, seed)
    while len(unique) < count:
        unique[next(texts)] = None
    return list(unique)


def questions(seed: int = SEED) -> list[Question]:
    """Return the held-out questions, all different, QUESTIONS_PER_KIND of each kind."""
    rng = random.Random(f"questions:{seed}")
    unique: dict[str, Question] = {}
    for kind, count in QUESTIONS_PER_KIND.items():
        while sum(item.kind == kind for item in unique.values()) < count:
            item = draw_question(rng, "evaluation", kind)
            unique[item.prompt] = item
    return list(unique.values())


def text_files(seed: int = SEED) -> dict[str, str]:
    """Return the content of every committed text file by its name."""
    rows = {
        "calibration.jsonl": [{"text": text} for text in held_out("calibration", CALIBRATION_DOCUMENTS, seed)],
        "evaluation.jsonl": [{"text": text} for text in held_out("evaluation", EVALUATION_DOCUMENTS, seed)],
        "questions.jsonl": [{"prompt": item.prompt, "answer": item.answer} for item in questions(seed)],
    }
    return {name: "".join(json.dumps(row) + "\n" for row in content) for name, content in rows.items()}


def main() -> None:
    """Write the text files, or print a few training texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="folder for the jsonl files; without it, print samples")
    out: Path | None = parser.parse_args().out
    if out is None:
        print(*islice(documents("train"), 12), sep="\n---\n")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, content in text_files().items():
        (out / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
