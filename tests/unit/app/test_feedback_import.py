"""`mace feedback import` against the feedback routes, a real store and a real socket."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from app.cli import app
from app.importing.delivery import Delivered, DeliveryError, Server
from app.importing.importer import Importer, ProgressFile
from app.importing.sources import open_source
from tests.support.feedback_server import FeedbackServer


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MACE_URL", raising=False)
    server = FeedbackServer(tmp_path / "state").start()
    yield server
    server.stop()


def trl(index):
    return {"prompt": f"question {index}", "chosen": f"good {index}", "rejected": f"bad {index}", "score": index}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*args, code=0):
    """The report of one import."""
    result = CliRunner().invoke(app, ["feedback", "import", *map(str, args), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code in (0, 1) and result.stdout else result.stderr


def importer(source, server, **options):
    file = ProgressFile(source.identity, server.url)
    return Importer(source, client(server), progress_file=file, **options)


def client(server, waits=None, patience_s=30.0):
    note = (lambda *wait: waits.append(wait)) if waits is not None else (lambda *_: None)
    return Server(server.url, {}, patience_s, note, sleep=lambda delay_s: time.sleep(min(delay_s, 0.05)))


MIXED = [
    trl(1),
    {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
    {"prompt": "q", "completion": "a", "label": True},
    {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": "same", "rejected": "same "},
    {"prompt": "x" * 2001, "chosen": "a", "rejected": "b"},
    trl(1),
]


def test_mixed_rows_are_imported_and_refused_rows_are_written_with_their_reasons(server, tmp_path):
    path = write_lines(tmp_path / "mixed.jsonl", MIXED)
    path.write_text(path.read_text() + "\n{oops\n[1]\n")
    report = run(path, "--url", server.url, "--rejected", tmp_path / "no.jsonl")
    assert (report["rows"], report["accepted"], report["duplicates"], report["rejected"]) == (9, 3, 1, 5)
    assert report["formats"] == {"trl": 4, "transcript": 1, "question": 1}
    assert report["dropped_columns"] == {"score": 2}
    refused = [json.loads(line) for line in (tmp_path / "no.jsonl").read_text().splitlines()]
    assert [(row["row"], row["param"]) for row in refused] == [
        *((3, "completion"), (5, "rejected"), (6, "prompt"), (9, None), (10, None))
    ]
    assert "KTO" in refused[0]["reason"]
    assert (refused[1]["data"], refused[3]["data"]) == (MIXED[4], "{oops")
    assert server.num_pairs() == 3


def test_repeating_an_import_adds_nothing(server, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(700)])
    assert run(path, "--url", server.url)["accepted"] == 700
    assert run(path, "--url", server.url)["duplicates"] == 700
    assert server.num_pairs() == 700


def test_every_refusal_of_a_batch_is_reported(server, tmp_path):
    path = write_lines(
        tmp_path / "bad.jsonl", [{**trl(index), "rejected": f"good {index}"} for index in range(600)]
    )
    report = run(path, "--url", server.url, "--rejected", tmp_path / "no.jsonl", code=1)
    assert (report["rejected"], len(report["reasons"]), report["reasons"][0]["count"]) == (600, 1, 600)
    assert len((tmp_path / "no.jsonl").read_text().splitlines()) == 600


def test_after_an_interrupt_the_import_goes_on_where_it_was(server, tmp_path):
    rows = [trl(index) for index in range(1, 2001)]
    rows[10] = rows[1400] = {"prompt": "q", "completion": "a"}
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", rows)))
    rejected = tmp_path / "no.jsonl"

    def interrupt(progress, done):
        if progress.next_after >= 1000:
            raise KeyboardInterrupt

    first = importer(source, server, rejected=rejected, on_settled=interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    with rejected.open("a") as file:
        file.write("rows that were written but not settled\n")
    imports_before = server.num_imports
    second = importer(source, server, rejected=rejected)
    assert second.resume()
    tally = second.run().tally
    assert (tally.num_rows, tally.num_accepted, tally.num_duplicates, tally.num_rejected) == (2000, 1998, 0, 2)
    assert server.num_imports - imports_before == 2
    assert [json.loads(line)["row"] for line in rejected.read_text().splitlines()] == [11, 1401]
    assert not importer(source, server).resume()


def test_progress_counts_only_for_the_same_data_and_a_server_that_has_them(server, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(600)])

    def interrupt(progress, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importer(open_source(str(path)), server, on_settled=interrupt).run()
    assert importer(open_source(str(path)), server).resume()
    [last] = server.store.feedback.page(limit=1000).entries[-1:]
    server.store.feedback.delete(last.id)
    assert not importer(open_source(str(path)), server).resume()
    write_lines(path, [trl(index) for index in range(601)])
    assert ProgressFile(open_source(str(path)).identity, server.url).load() is None


def test_a_server_that_is_away_is_waited_for(server, tmp_path):
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(1200)])))
    waits = []
    server.answers = [503, 502, None, 429]
    sink = client(server, waits)
    tally = Importer(source, sink).run().tally
    assert (tally.num_accepted, tally.num_duplicates, server.num_pairs()) == (1200, 0, 1200)
    assert [delay_s for _, delay_s in waits] == [1.0, 1.0, 0.5]
    assert "busy (HTTP 503)" in waits[0][0]


def test_a_lost_connection_is_tried_again_and_loses_no_row(server, tmp_path):
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(1200)])))
    waits = []

    def note(reason, delay_s):
        waits.append(reason)
        server.start()

    def stop_after_first_batch(progress, done):
        if progress.next_after == 500:
            server.stop()

    sink = Server(server.url, {}, 30.0, note, sleep=lambda _: None)
    tally = Importer(source, sink, on_settled=stop_after_first_batch).run().tally
    assert (tally.num_accepted, server.num_pairs(), len(waits)) == (1200, 1200, 1)
    assert "cannot be reached" in waits[0]


def test_patience_ends(server):
    server.answers = [503] * 100
    with pytest.raises(DeliveryError, match="gave up after 2 s: busy"):
        Server(server.url, {}, 2.0, lambda *_: None).send([b"{}"])


def test_batches_that_are_too_large_for_the_server_are_halved(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = FeedbackServer(tmp_path / "state", max_body_bytes=1500).start()
    rows = [trl(index) for index in range(40)]
    rows[25] = {**trl(25), "chosen": "x" * 1600}
    report = run(write_lines(tmp_path / "rows.jsonl", rows), "--url", small.url)
    small.stop()
    assert (report["accepted"], report["rejected"], small.num_pairs()) == (39, 1, 39)
    assert report["reasons"][0]["first_row"] == 26


def test_refusals_of_the_server_end_the_import_with_its_words(server, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [trl(1)])
    server.answers = [401]
    assert "busy (HTTP 401)" in run(path, "--url", server.url, code=1)
    assert "no server at" in run(path, "--url", "http://127.0.0.1:9", code=1)
    assert server.num_pairs() == 0


def test_a_limit_is_raised_step_by_step(server, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(50)])
    assert run(path, "--url", server.url, "--limit", 20)["accepted"] == 20
    second = run(path, "--url", server.url, "--limit", 30)
    assert (second["rows_this_run"], second["accepted"], second["duplicates"]) == (10, 30, 0)
    third = run(path, "--url", server.url, "--restart")
    assert (third["rows_this_run"], third["accepted"], third["duplicates"]) == (50, 20, 30)


def test_a_dry_run_needs_no_server_and_finds_what_it_would_refuse(tmp_path):
    report = run(write_lines(tmp_path / "mixed.jsonl", MIXED), "--dry-run", "--url", "http://127.0.0.1:9")
    assert (report["dry_run"], report["accepted"], report["rejected"]) == (True, 5, 2)


def test_the_table_shows_reasons_and_takes_no_markup_from_rows(tmp_path):
    rows = [trl(1), {"[red]x": 1}, {"prompt": "q", "completion": "a", "label": 1}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    shown = CliRunner().invoke(app, ["feedback", "import", str(path), "--dry-run"]).stdout
    assert "3 rows: 1 usable" in shown
    assert "[red]x" in shown.replace("\n", "")


def test_ctrl_c_says_how_to_go_on_while_the_server_is_away(server, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [trl(index) for index in range(1200)])
    server.answers = [None, *[503] * 100]
    mace = Path(sys.executable).with_name("mace")
    process = subprocess.Popen(
        [mace, "feedback", "import", path, "--url", server.url],
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while server.num_imports < 2:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted behind row 500, up to there everything is committed" in said
    server.answers = []
    report = run(path, "--url", server.url)
    assert (report["rows_this_run"], report["accepted"], report["duplicates"]) == (700, 1200, 0)
    assert threading.active_count() < 50
    assert server.num_pairs() == 1200


def test_gzip_csv_and_json_arrays_are_read(tmp_path):
    rows = [trl(index) for index in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text(lines)
    csv = 'prompt,chosen,rejected,score\n"question, 0","good\n""0""",007,\nq,a\n'
    (tmp_path / "d.csv").write_text(csv)
    for name in ("a.jsonl.gz", "b.json", "c.json"):
        assert run(tmp_path / name, "--dry-run")["accepted"] == 3, name
    first, second = open_source(str(tmp_path / "d.csv")).rows(0)
    expected = {"prompt": "question, 0", "chosen": 'good\n"0"', "rejected": "007", "score": None}
    assert (first.value, first.error) == (expected, None)
    assert "2 values, the header 4" in str(second.error)


LINES = "".join(json.dumps(trl(index)) + "\n" for index in (1, 2, 3))
LATIN = json.dumps({**trl(4), "chosen": "Grün"}, ensure_ascii=False).encode("latin-1") + b"\n"
CUT = b"".join(gzip.compress(json.dumps(trl(index)).encode() + b"\n", mtime=0) for index in (1, 2, 3))[:-20]


@pytest.mark.parametrize(
    ("name", "data", "accepted"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode(), 3),
        ("boms.jsonl", LINES.replace("{", "\ufeff{").encode(), 3),
        ("bom.json", b"\xef\xbb\xbf[" + ",".join(LINES.split("\n")[:3]).encode() + b"]", 3),
        ("bom.csv", "\ufeffprompt,chosen,rejected\r\nq,a,b\r\n".encode(), 1),
        ("crlf.jsonl", LINES.replace("\n", "\r\n \r\n").encode(), 3),
        ("cr.jsonl", LINES.replace("\n", "\r").encode(), 3),
        ("members.jsonl.gz", b"".join(gzip.compress(line.encode() + b"\n", mtime=0) for line in LINES.split("\n")), 3),
        ("separators.jsonl", LINES.replace("good", "\u2028g\x85 \u2029").encode(), 3),
        ("latin.jsonl", LATIN + LINES.encode(), 3),
        ("surrogate.jsonl", LINES.replace("good 1", "\\ud83d").encode(), 2),
        ("twice.json", b'[{"a": 1, "a": 2},' + ",".join(LINES.split("\n")[:3]).encode() + b"]", 3),
    ],
)  # fmt: skip
def test_valid_files_of_every_spelling_are_read_whole(tmp_path, server, name, data, accepted):
    (tmp_path / name).write_bytes(data)
    report = run(tmp_path / name, "--url", server.url)
    assert (report["accepted"], server.num_pairs()) == (accepted, accepted)
    if name.endswith("jsonl"):  # the same over HTTP
        reply = httpx.post(f"{server.url}/v1/feedback/import", content=data).json()
        assert (reply["num_duplicates"], reply["num_errors"]) == (accepted, report["rejected"])


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.json", f"[{LINES}]".encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.csv", "prompt,chosen,rejected\nq,ä,b\n".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "the data are gzip"),
        ("a.jsonl.gz", LINES.encode(), "Not a gzipped file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "the suffix must be one of"),
        ("a", LINES.encode(), "the suffix must be one of"),
        ("a.csv", b"prompt;chosen;rejected\nq;a;b\n", "with commas between them"),
        ("a.csv", b"prompt,chosen,rejected,chosen\nq,a,b,c\n", "the column 'chosen' twice"),
        ("a.jsonl", b'[{"prompt": "q"}]', "one JSON array"),
        ("a.json", b'[{"prompt": "q"}]\n[{"prompt": "q"}]', "behind the end of the JSON array"),
    ],
)
def test_a_file_that_is_no_text_of_rows_gets_one_true_sentence(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    shown = [
        line for line in run(tmp_path / name, "--dry-run", code=1).splitlines() if "stopped behind row" not in line
    ]
    assert said in " ".join(shown)
    assert sum("mace: " in line for line in shown) == 1


def test_rows_before_the_damage_of_a_cut_file_are_taken_and_the_damage_is_said(tmp_path, server):
    (tmp_path / "cut.jsonl.gz").write_bytes(CUT)
    said = run(tmp_path / "cut.jsonl.gz", "--url", server.url, code=1)
    assert ("ended before" in said, server.num_pairs()) == (True, 2)


def test_arguments_of_tool_calls_in_arrow_are_those_that_were_sent(tmp_path):
    def row(**arguments):
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
        prompt = [*asked, {"role": "tool", "content": "rain", "tool_call_id": "c1"}]
        answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        return {"prompt": prompt, **answers}

    sent = [row(city="Ulm"), row(days=2)]
    pq.write_table(pa.Table.from_pylist(sent), tmp_path / "a.parquet")
    Dataset.from_list(sent).save_to_disk(tmp_path / "b")
    for name in ("a.parquet", "b"):
        assert [one.value for one in open_source(str(tmp_path / name)).rows(0)] == sent


def test_types_of_arrow_refuse_no_row_that_does_not_need_them_and_broken_cells_are_named(tmp_path):
    moment, late = datetime(2025, 1, 1, tzinfo=UTC), pa.scalar(10**15, pa.timestamp("s"))
    text = {"prompt": pa.array(["q", "r"]), "chosen": pa.array(["a", "b"]), "rejected": pa.array(["c", "d"])}
    talk = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    columns = {
        "a map": pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
        "id": pa.array([1, 2]),
        "created_at": pa.array([moment, None], pa.timestamp("ns", "UTC")),
        "tools": pa.array([None, [{"name": None}]]),
        "system": pa.array([float("nan"), None]),
        "messages": pa.array([[], [{"role": None, "content": None, "name": None}]], pa.list_(talk)),
    }
    pq.write_table(pa.table(text | columns), tmp_path / "odd.parquet")
    rows = list(open_source(str(tmp_path / "odd.parquet")).rows(0))
    assert run(tmp_path / "odd.parquet", "--dry-run")["accepted"] == 2
    assert (
        rows[0].value["a map"],
        [row.number for row in open_source(str(tmp_path / "odd.parquet")).rows(1)],
    ) == ({"a": 1}, [2])
    twice = pa.array([[("a", 1), ("a", 2)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(
        pa.table({**text, "tags": twice, "at": pa.array([0, 1], pa.timestamp("s"))}), tmp_path / "no.parquet"
    )
    report = run(tmp_path / "no.parquet", "--dry-run")
    assert (report["accepted"], report["reasons"][0]["param"]) == (1, "tags")
    pq.write_table(
        pa.table({**text, "at": pa.array([late.value, 1], pa.timestamp("s"))}), tmp_path / "late.parquet"
    )
    assert run(tmp_path / "late.parquet", "--dry-run")["reasons"][0]["param"] == "at"
    pq.write_table(
        pa.table([*text.values(), text["prompt"]], names=[*text, "chosen"]), tmp_path / "double.parquet"
    )
    assert "'chosen' twice" in run(tmp_path / "double.parquet", "--dry-run", code=1)


def test_a_json_array_is_read_across_chunks_and_its_damage_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr("app.importing.sources._CHUNK_CHARS", 7)
    path = tmp_path / "rows.json"
    path.write_text(' [ {"a": "]}"} ,\n{"b": [1, 2.5]}, 12345678901234567890, null ] ')
    values = [{"a": "]}"}, {"b": [1, 2.5]}, 12345678901234567890, None]
    assert [row.value for row in open_source(str(path)).rows(0)] == values
    assert [row.number for row in open_source(str(path)).rows(2)] == [3, 4]
    path.write_text('[{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt"')
    assert "breaks off or is damaged behind item 1" in run(path, "--dry-run", code=1)


def test_saved_data_sets_and_parquet_files_are_read(server, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{**trl(index), "at": index * 1.5} for index in range(1500)]
    table = Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "one")
    DatasetDict(train=table, test=table.select(range(5))).save_to_disk(tmp_path / "two")
    table.to_parquet(tmp_path / "rows.parquet")
    assert run(tmp_path / "one", "--url", server.url)["accepted"] == 1500
    assert run(tmp_path / "two", "--url", server.url)["duplicates"] == 1500
    assert run(tmp_path / "two", "--split", "test", "--url", server.url)["duplicates"] == 5
    assert run(tmp_path / "rows.parquet", "--url", server.url)["duplicates"] == 1500
    assert "choose one with --split: train, test" in run(tmp_path / "two", "--split", "dev", "--dry-run", code=1)
    for name in ("one", "rows.parquet"):
        assert [row.number for row in open_source(str(tmp_path / name)).rows(1498)] == [1499, 1500]


def test_conversations_of_a_parquet_file_lose_their_nulls(tmp_path):
    from datasets import Dataset

    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [talk[0], {"role": "assistant", "content": "b", "name": "x"}]
    Dataset.from_list([{"chosen": talk, "rejected": other}]).to_parquet(tmp_path / "rows.parquet")
    report = run(tmp_path / "rows.parquet", "--dry-run")
    assert (report["accepted"], report["formats"]) == (1, {"implicit_prompt": 1})


def test_sources_that_cannot_be_read_are_named_in_one_line(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "rows.parquet").write_text("x")
    (tmp_path / "rows.jsonl.gz").write_text("x")
    (tmp_path / "empty.csv").write_text("")
    for name, reason in {
        "rows.txt": "the suffix must be one of",
        "rows.parquet": "cannot read",
        "rows.jsonl.gz": "cannot read",
        "empty.csv": "the CSV file is empty",
        "none.jsonl": "there is no file",
        "": "no data set saved",
    }.items():
        said = run(tmp_path / name, "--dry-run", code=1).strip()
        assert reason in said
        assert said.count("mace: ") == 1 + ("stopped" in said), said


def test_an_unreachable_hub_is_said_at_once_and_in_one_line(tmp_path):
    mace = Path(sys.executable).with_name("mace")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_COLOR": "1"}
    command = [mace, "feedback", "import", "Anthropic/hh-rlhf", "--dry-run"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        "mace: cannot load Anthropic/hh-rlhf: the hub cannot be reached (http://127.0.0.1:9: "
    )
    assert ended.stderr.count("\n") == 1


class _TakesAll:
    """A sink that measures this process's memory with every batch."""

    def __init__(self):
        self.rss_bytes = []

    def knows(self, record_id):
        return True

    def send(self, lines):
        self.rss_bytes.append(psutil.Process().memory_info().rss)
        return Delivered(len(lines), 0, [])


@pytest.mark.parametrize(("suffix", "num_rows", "num_chars"), [(".jsonl", 50_000, 1100), (".json", 10_000, 6000)])
def test_memory_stays_flat_over_a_large_file(tmp_path, suffix, num_rows, num_chars):
    path = tmp_path / f"rows{suffix}"
    with path.open("w") as file:
        file.write("[" if suffix == ".json" else "")
        for index in range(num_rows):
            end = "\n" if suffix == ".jsonl" else "]" if index == num_rows - 1 else ","
            file.write(json.dumps({**trl(index), "chosen": f"good {index} " + "x" * num_chars}) + end)
    assert path.stat().st_size > 55 << 20
    sink, before_bytes = _TakesAll(), psutil.Process().memory_info().rss
    assert Importer(open_source(str(path)), sink).run().tally.num_accepted == num_rows
    assert max(sink.rss_bytes) - before_bytes < 40 << 20
