"""The two built-in models as subjects: what they are asked, and how a program judges what they say."""

import re
from collections.abc import Callable, Sequence

from app.demo.taste import Subject, Verdict
from engine.tiny.knowledge import Style, held_out_questions, judge, preference_questions, render


class Tiny:
    """The tiny assistant knows 180 facts in four styles, so both style and truth of an answer can be told."""

    knows_truth = True
    tastes: tuple[str, ...] = tuple(style.value for style in Style)
    course: tuple[str, ...] = (Style.POLITE.value, Style.EXPLAINED.value)
    max_tokens = 64
    temperature = 1.0
    candidates = 8
    pause_s = 0.0

    def __init__(self) -> None:
        held_out, for_preferences = held_out_questions(), preference_questions()
        self._by_text = {question.text: question for question in (*held_out, *for_preferences)}
        self.held_out: Sequence[str] = [question.text for question in held_out]
        self.for_preferences: Sequence[str] = [question.text for question in for_preferences]

    def judge(self, question: str, answer: str) -> Verdict:
        """Style and truth, as `engine.tiny.knowledge` tells them."""
        judgement = judge(self._by_text[question], answer)
        tastes = frozenset() if judgement.style is None else frozenset({judgement.style.value})
        return Verdict(tastes, judgement.is_right)

    def edited(self, question: str, answer: str, taste: str) -> str:  # noqa: ARG002
        """The canonical reply."""
        return render(self._by_text[question], Style(taste))


_SENTENCE = re.compile(r"[^\s].*?[.!?]+(?=[\s\"')*]|$)", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_WORD = re.compile(r"\w+")
_MIN_NEW_WORDS = 3
"""That an answer has to say and its question does not: "A volcano is a volcano." has none."""
_SUBJECT = re.compile(r"\A(.{1,60}?)\s(is|are)\b")
_PRONOUN = re.compile(r"(It|They)\b")

_TOPICS = (
    "a volcano, a rainbow, the moon, a desert, an island, a glacier, a river, an earthquake, the ocean, a "
    "forest, a cloud, the wind, a star, a planet, gravity, a magnet, electricity, a battery, a camera, a "
    "telescope, a microscope, a bridge, a clock, a compass, a map, a library, a museum, a hospital, a market, "
    "a school, a bank, a farm, a garden, a village, a train, a bicycle, a ship, an airplane, a submarine, a "
    "lighthouse, bread, cheese, honey, salt, chocolate, coffee, tea, rice, a potato, an apple, an orange, "
    "soup, a cake, a whale, a bee, an elephant, a penguin, an owl, a spider, a butterfly, a dolphin, a lion, a "
    "wolf, a horse, a frog, an ant, a tree, a rose, a mushroom, a seed, music, a piano, a violin, a drum, a "
    "poem, a novel, a painting, a theater, a film, a dance, football, chess, swimming, a marathon, a king, a "
    "president, a judge, a doctor, a teacher, a farmer, a pilot, a baker, money, a tax, a law, a city, a "
    "friend, a holiday, a dream, sleep, laughter, a smile, the heart, the brain, a bone, blood, a vaccine, a "
    "fever"
)


class Smollm2:
    """SmolLM2-135M-Instruct: a program can tell the form of its answers, hardly their truth (see `app.demo.guard`)."""

    knows_truth = False
    tastes: tuple[str, ...] = ("brief", "direct", "listed", "detailed")
    course: tuple[str, ...] = ("brief", "detailed")
    max_tokens = 128
    temperature = 0.7  # its generation_config's
    candidates = 1
    pause_s = 20.0

    def __init__(self) -> None:
        asked = [f"What is {topic.strip()}?" for topic in _TOPICS.split(",")]
        self.held_out: Sequence[str] = asked[::3]
        self.for_preferences: Sequence[str] = [one for number, one in enumerate(asked) if number % 3]

    def judge(self, question: str, answer: str) -> Verdict:
        """The tastes by form; truth is unknown. What says nothing suits nobody."""
        said = set(_WORD.findall(answer.lower())) - set(_WORD.findall(question.lower()))
        if len(said) < _MIN_NEW_WORDS:
            return Verdict(frozenset(), None)
        return Verdict(frozenset(taste for taste, suits in _FORMS.items() if suits(answer.strip())), None)

    def edited(self, question: str, answer: str, taste: str) -> str | None:
        """Its sentences: the first, all in a list, or all with a pronoun for what was asked for.

        As little as the taste asks for, since a pair teaches all that its answers differ in.
        """
        edit = _EDITS[taste](_sentences(answer))
        return edit if taste in self.judge(question, edit).tastes else None


def _sentences(answer: str) -> list[str]:
    """Whole sentences; what was cut off at the end is none."""
    return [" ".join(sentence.split()) for sentence in _SENTENCE.findall(_ITEM.sub("", answer))]


def _pronoun(subject: re.Match[str]) -> str:
    return f"{'It' if subject[2] == 'is' else 'They'} {subject[2]}"


def _ends(answer: str) -> bool:
    return answer[-1:] in set(".!?\"')*") and bool(_sentences(answer))


_FORMS: dict[str, Callable[[str], bool]] = {
    "brief": lambda answer: len(_sentences(answer)) == 1 and _ends(answer) and not answer.endswith("?"),
    "direct": lambda answer: _PRONOUN.match(answer) is not None,
    "listed": lambda answer: len(_ITEM.findall(answer)) >= 2,
    "detailed": lambda answer: len(_sentences(answer)) >= 3,
}
"""One sentence and no more; one that does not name again what was asked for; two lines or more that begin as those of
a list; three sentences or more."""

_EDITS: dict[str, Callable[[list[str]], str]] = {
    "brief": lambda sentences: "".join(sentences[:1]),
    "direct": lambda sentences: _SUBJECT.sub(_pronoun, " ".join(sentences), count=1),
    "listed": lambda sentences: "\n".join(f"- {sentence}" for sentence in sentences),
    "detailed": lambda sentences: " ".join(sentences),
}


def subject_of(root: str) -> Subject | None:
    """The subject for a model by its root as `GET /v1/models` names it; None for a model that nobody can judge."""
    if root.startswith("tiny-assistant"):
        return Tiny()
    return Smollm2() if root.startswith("smollm2-135m-instruct") else None
