"""What an import was given is what an export gives back, or the row is refused: over all formats and carriers."""

import csv
import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from alignment.records.row_formats import to_api_row
from alignment.store.feedback_store import FeedbackStore
from alignment.store.formats import export_chunk, export_row, import_jsonl
from alignment.store.intake import prepare
from app.importing.delivery import Delivered, LineRefusal
from app.importing.importer import Importer
from app.importing.sources import open_source
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError

SPELT = '[{"role": "user", "content": "x"}]'
"""Text that spells messages; as a column of text it is refused, inside a message it is what somebody said."""
MARKED = "User: hi\nAssistant:"
ODD = (
    "\u2028",
    " lead",
    "end ",
    "two\n\nparts",
    "a\r\nb",
    "\x85",
    "Human",
    "007",
    "null",
    "NaN",
    '{"a": 1}',
    "\ufeffbom",
    "=1+1",
)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
TEXTS = st.one_of(PLAIN, st.sampled_from((*ODD, SPELT, MARKED))).filter(lambda text: bool(text.strip()))
PAIRS = st.fixed_dictionaries(
    {
        "system": st.none() | TEXTS,
        "turns": st.lists(st.tuples(TEXTS, TEXTS), max_size=2),
        "asked": TEXTS,
        "chosen": TEXTS,
        "rejected": TEXTS,
    }
).filter(lambda pair: pair["chosen"].strip() != pair["rejected"].strip())


def message(role, content):
    return {"role": role, "content": content}


def says(text):
    return [message("assistant", text)]


def conversation(pair):
    before = [message("system", pair["system"])] if pair["system"] else []
    turns = [one for user, answer in pair["turns"] for one in (message("user", user), *says(answer))]
    return [*before, *turns, message("user", pair["asked"])]


def whole(pair, **more):
    return {**{name: conversation(pair) + says(pair[name]) for name in ("chosen", "rejected")}, **more}


def answers(pair, **more):
    return {**more, "chosen": pair["chosen"], "rejected": pair["rejected"]}


def transcript(pair, answer):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[one['role']]}: {one['content']}" for one in [*conversation(pair), *says(answer)])


def openai(pair):
    return {
        "input": {"messages": conversation(pair)},
        "preferred_output": says(pair["chosen"]),
        "non_preferred_output": says(pair["rejected"]),
    }


def shp(pair, label):
    better, worse = ("A", "B") if label else ("B", "A")
    refs = {f"human_ref_{better}": pair["chosen"], f"human_ref_{worse}": pair["rejected"]}
    return {"history": pair["asked"], **refs, "labels": label}


ANY = ("asked", "chosen", "rejected", "system", "turns")
ONE_TURN = ("asked", "chosen", "rejected", "system")
NO_SYSTEM = ("asked", "chosen", "rejected", "turns")
BARE = ("asked", "chosen", "rejected")
TEXT_ANSWERS = ("chosen", "rejected")


def under_system(pair):
    bare = conversation({**pair, "system": None})
    return {
        "system": pair["system"],
        "prompt": bare,
        "chosen": says(pair["chosen"]),
        "rejected": says(pair["rejected"]),
    }


def llama_factory(pair):
    history = [list(turn) for turn in pair["turns"]]
    return answers(pair, instruction=pair["asked"], input="", system=pair["system"] or "", history=history)


def full_hh(pair):
    return {"prompt": transcript(pair, "").rstrip(" "), **{name: " " + pair[name] for name in TEXT_ANSWERS}}


def responses(pair):
    return {"instruction": pair["asked"], **{f"{name}_response": pair[name] for name in TEXT_ANSWERS}}


FORMATS = {
    # name: what the format can say (+: always), columns of text in which SPELT is refused, and the row
    "trl text": (BARE, BARE, lambda p: answers(p, prompt=p["asked"])),
    "literal": (BARE, (), lambda p: answers(p, type="preference", prompt=p["asked"])),
    "trl text under system": (
        (*BARE, "+system"),
        ONE_TURN,
        lambda p: answers(p, prompt=p["asked"], system=p["system"]),
    ),
    "trl messages": (
        ANY,
        (),
        lambda p: {"prompt": conversation(p), **{one: says(p[one]) for one in TEXT_ANSWERS}},
    ),
    "trl objects": (
        ANY,
        (),
        lambda p: {"prompt": conversation(p), **{one: says(p[one])[0] for one in TEXT_ANSWERS}},
    ),
    "trl whole": (ANY, (), lambda p: whole(p, prompt=conversation(p))),
    "trl messages under system": ((*NO_SYSTEM, "+system"), ("system",), under_system),
    "ultrafeedback": (
        ANY,
        (),
        lambda p: whole(p, prompt=p["asked"], messages=conversation(p) + says(p["chosen"])),
    ),
    "implicit": (ANY, (), whole),
    "openai": (ANY, (), openai),
    "messages": (ANY, TEXT_ANSWERS, lambda p: answers(p, messages=conversation(p))),
    "question": (BARE, BARE, lambda p: answers(p, question=p["asked"])),
    "orca": ((*BARE, "+system"), ONE_TURN, lambda p: answers(p, input=p["asked"], system=p["system"])),
    "responses": (BARE, BARE, responses),
    "llama factory": (ANY, ONE_TURN, llama_factory),
    "transcript": (NO_SYSTEM, (), lambda p: {one: transcript(p, p[one]) for one in TEXT_ANSWERS}),
    "full-hh": (NO_SYSTEM, TEXT_ANSWERS, full_hh),
    "shp": (BARE, (), lambda p: shp(p, 1)),
    "shp reversed": (BARE, (), lambda p: shp(p, 0)),
}


def meant(name, pair):
    """What is left of the pair in this format; None where the format cannot say it."""
    can, _, _ = FORMATS[name]
    system = pair["system"] if "system" in can else (pair["system"] or "be brief") if "+system" in can else None
    pair = {**pair, "system": system, "turns": pair["turns"] if "turns" in can else []}
    if name in ("transcript", "full-hh"):
        said = [one["content"] for one in conversation(pair)] + [pair["chosen"], pair["rejected"]]
        if any(text != text.strip() or "Human:" in text or "\n" in text for text in said):
            return None  # white space around a turn belongs to the format
    return pair


def is_refused(name, pair):
    _, columns, _ = FORMATS[name]
    spelt = any(pair[column] == SPELT for column in columns)
    return (
        spelt
        or ("asked" in columns and pair["asked"] == MARKED)
        or ("system" in columns and pair["system"] == MARKED)
    )


def expected(name, pair):
    is_text = name in ("trl text", "literal")
    return export_row(pair["asked"] if is_text else conversation(pair), pair["chosen"], pair["rejected"], "trl")


def write(path, rows):
    """The rows in the form that the path's suffix names."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(b"".join(gzip.compress(line + b"\n") for line in lines.split(b"\n")))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(json.dumps(rows).encode() if path.suffix == ".json" else lines)
    return path


class InStore:
    """A sink that stores as the server does."""

    def __init__(self, directory):
        self.store = FeedbackStore.open(FeedbackConfig(), directory)

    def knows(self, record_id):
        return False

    def send(self, lines):
        report = import_jsonl(b"\n".join(lines).splitlines(), self.store.feedback.add)
        refusals = [LineRefusal(error.line_number - 1, error.message, error.param) for error in report.errors]
        return Delivered(report.num_accepted, report.num_duplicates, refusals)

    def exported(self):
        return export_chunk(self.store.pairs, "trl", 0, 1000)[0]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(st.data())
@pytest.mark.parametrize("carrier", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "http"])
def test_what_was_read_is_what_an_export_gives_back(carrier, data):
    name = data.draw(st.sampled_from(sorted(FORMATS)), "format")
    pairs = [meant(name, pair) for pair in data.draw(st.lists(PAIRS, min_size=1, max_size=4), "pairs")]
    pairs = [pair for pair in pairs if pair is not None]
    assume(pairs)
    extra = data.draw(
        st.sampled_from([{}, {"score": 2.5, "annotator": "x"}, {"context": "a fact that is said nowhere"}])
    )
    rows = [{**FORMATS[name][2](pair), **(extra if name != "literal" else {})} for pair in pairs]
    if carrier == "a.csv":
        assume(all(isinstance(value, str | int) for row in rows for value in row.values()))
    is_lost = "context" in extra and name != "literal"
    fates = [(pair, is_lost or is_refused(name, pair)) for pair in pairs]
    with TemporaryDirectory() as folder:
        sink = InStore(Path(folder) / "first")
        if carrier == "http":
            body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            report = import_jsonl(body.splitlines(), sink.store.feedback.add)
            num_refused, dropped = report.num_errors, report.dropped_columns
        else:
            path = write(Path(folder) / carrier, rows)
            tally = Importer(open_source(str(path)), sink).run().tally
            num_refused, dropped = tally.num_rejected, tally.dropped_columns
        taken = [expected(name, pair) for pair, is_out in fates if not is_out]
        exported = sink.exported()
        assert exported == [row for index, row in enumerate(taken) if row not in taken[:index]]
        assert num_refused == sum(is_out for _, is_out in fates)
        assert ("annotator" in dropped) == ("annotator" in extra and name != "literal" and bool(taken))
        second = InStore(Path(folder) / "second")
        import_jsonl([json.dumps(row) for row in exported], second.store.feedback.add)
        assert second.exported() == exported


NAMES = [
    *(
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "question",
        "instruction",
        "input",
        "system",
        "history",
        "context",
    ),
    *(
        "tools",
        "chat_history",
        "documents",
        "chosen_response",
        "rejected_response",
        "conversation",
        "systemPrompt",
    ),
    *("human_ref_A", "human_ref_B", "previous_turns"),
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_column_that_was_asked_is_lost_in_any_mixture(data):
    """Each text of a row is unlike all others, so that one that went missing is seen."""
    count = iter(range(1000))

    def text():
        return f"text number {next(count)} of the row"

    shapes = {
        "text": text,
        "messages": lambda: [message("user", text())],
        "conversation": lambda: [message("user", text()), *says(text())],
        "exchanges": lambda: [[text(), text()]],
        "answer": lambda: says(text()),
    }
    shape = st.sampled_from(sorted(shapes))
    columns = data.draw(st.dictionaries(st.sampled_from(NAMES), shape, min_size=2, max_size=5))
    columns |= data.draw(
        st.sampled_from([{}, {"chosen": "text", "rejected": "text"}, {"chosen": "answer", "rejected": "answer"}])
    )
    row = {name: shapes[shape]() for name, shape in columns.items()}
    try:
        draft = prepare(to_api_row(row).item, None, FeedbackConfig()).draft
    except InvalidFeedbackError:
        return
    if draft is not None:
        kept = json.dumps(export_row(draft.prompt, draft.chosen, draft.rejected, "trl", draft.tools))
        assert [number for number in range(next(count)) if f"text number {number} of" not in kept] == []
