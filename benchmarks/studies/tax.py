"""What MACE costs before it has learnt anything: latencies and throughput beside plain vLLM. `mace bench tax`.

Servers on one model run one after another, again and again, and are asked by vLLM's own client
(`vllm.benchmarks.serve`: random prompts of 96 tokens, 64 new ones). The machine's speed changes from minute to minute,
so ratios are taken within a repeat, in which each server runs once.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer

from benchmarks.harness.energy import EnergyWatch
from benchmarks.harness.jobs import VERSIONED, MeasurementError
from benchmarks.harness.models import TITLES, ModelName, model_directories
from benchmarks.harness.report import (
    JOULES,
    AsJson,
    Column,
    Out,
    StateDir,
    checks_table,
    digits,
    note,
    show,
    table_of,
)
from benchmarks.harness.server import ServerProcess, cores_by_role, cpu_seconds, own_servers, plain_server
from benchmarks.harness.statistics import ratio_of
from benchmarks.studies.chaos.command import new_directories
from profiler.device import installed_versions

PROMPT_TOKENS = 96
ANSWER_TOKENS = 64

BASE = "vLLM"
NO_LORA = "vLLM, no LoRA"
SIDES: dict[str, dict[str, Any]] = {
    BASE: {"enforce-eager": False},
    "vLLM, eager": {},
    NO_LORA: {"enforce-eager": False, "enable-lora": False},
    "MACE, training off": {"training": {"enabled": False}},
    "MACE": {"training": {"enabled": True}},
}
"""Plain vLLM by the arguments that differ from an eager one with LoRA, and MACE by its settings."""
QUICK_SIDES = (BASE, "vLLM, eager", "MACE")

RATES: dict[ModelName, tuple[float, ...]] = {
    "tiny": (2, 5, 8),
    "smollm2": (0.5, 1, 1.5),
    "half-b": (0.1, 0.2, 0.3),
}
"""Requests a second: little, medium and near what two cores can do."""
STREAMS = (1, 4, 8)

MIN_THROUGHPUT = 0.97
MAX_TTFT = 1.1
TTFT_ROOM_MS = 5.0
"""A TTFT that is longer by no more than this is well, whatever the ratio."""
MAX_TPOT = 1.03
MAX_TPOT_WITHOUT_LORA = 1.15
MAX_OTHER_CORES = 0.15
"""Cores of all processes that are not the engine, while it serves."""

_ENGINE_ROLES = frozenset({"worker", "engine core"})
_SETTLE_S = 3.0
_LATENCIES = ("ttft", "tpot", "itl", "e2el")
_NUMBERS = (
    *(f"{latency}_p{percent}_ms" for latency in _LATENCIES for percent in (50, 90, 99)),
    "tokens_per_s",
)


@dataclass(frozen=True, slots=True)
class Load:
    """An open loop at a rate, or a closed one of so many streams."""

    rate_per_s: float | None = None
    streams: int | None = None

    @property
    def name(self) -> str:
        """As in the report."""
        return f"{self.rate_per_s:g}/s" if self.rate_per_s is not None else f"{self.streams} streams"


def main(
    as_json: AsJson = False,
    model: Annotated[Literal["tiny", "smollm2", "half-b", "all"], typer.Option(help="Which model")] = "all",
    seconds: Annotated[float, typer.Option(min=5, help="Length of each open loop")] = 40.0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each load is repeated")] = 3,
    quick: Annotated[bool, typer.Option(help="Two models, three servers, one rate and one stream")] = False,
    cells: Annotated[Path | None, typer.Option(help="Keep each measured cell here, and go on from there")] = None,
    state_dir: StateDir = Path("state"),
    out: Out = None,
) -> None:
    """Compare `mace serve` with plain vLLM by vLLM's own client; exit code 1 if a target is missed."""
    names: list[ModelName] = [model] if model != "all" else ["tiny", "smollm2"] if quick else list(RATES)
    sides = QUICK_SIDES if quick else tuple(SIDES)
    own_servers()
    found = []
    if cells is not None and cells.exists():
        found = [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]
    built = {*names, "smollm2"} if "half-b" in names else names
    with model_directories(built, state_dir, show_progress=not as_json) as directories:
        if "half-b" in names:
            _lend_tokenizer(directories["smollm2"], directories["half-b"])
        for name in names:
            middle = RATES[name][1]
            rates, streams = ((middle,), (1,)) if quick else (RATES[name], STREAMS)
            loads = [*(Load(rate_per_s=rate) for rate in rates), *(Load(streams=number) for number in streams)]
            done = {_key(cell) for cell in found}
            todo = [
                (repeat, side, load)
                for repeat in range(repeats)
                for side in _turned(sides, repeat)
                for load in loads
                if (name, repeat, load.name, side) not in done
            ]
            for cell in measure(name, directories[name], state_dir, todo, seconds):
                found.append(cell)
                if cells is not None:
                    with cells.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
    report = make_report([cell for cell in found if cell["model"] in names])
    show(report, _tables(report), as_json, out)
    raise typer.Exit(0 if all(check["passed"] in (True, None) for check in report["checks"]) else 1)


def _lend_tokenizer(lender: Path, borrower: Path) -> None:
    """Random weights have no words of their own, and vLLM's client and servers want a tokenizer."""
    for path in (*lender.glob("*token*"), *lender.glob("chat_template*")):
        shutil.copy(path, borrower)


def _turned(sides: Sequence[str], repeat: int) -> Sequence[str]:
    """Each server is the first one now and then."""
    return (*sides[repeat % len(sides) :], *sides[: repeat % len(sides)])


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["model"], cell["repeat"], cell["load"], cell["side"]


def measure(
    name: ModelName, model_dir: Path, state_dir: Path, todo: Sequence[tuple[int, str, Load]], seconds: float
) -> Iterator[dict[str, Any]]:
    """Start one server after another, each for what is to do with it in one repeat, and yield the cells.

    Raises:
        MeasurementError: a request failed, or a server does not answer.
        ServerError: a server does not start.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}
        for (repeat, side), cells in itertools.groupby(todo, key=lambda cell: cell[:2]):
            if side not in servers:
                servers[side] = _server(stack, name, model_dir, state_dir, side)
            with servers[side].running():
                if side.startswith("MACE"):
                    servers[side].wait_for_profile()
                _ask(servers[side], model_dir, Load(streams=4), name, -1, seconds)
                time.sleep(_SETTLE_S)
                for _, _, load in cells:
                    cell = {"model": name, "repeat": repeat, "load": load.name, "side": side}
                    cell |= _ask(servers[side], model_dir, load, name, repeat, seconds)
                    note(
                        f"{TITLES[name]}, repeat {repeat + 1}, {load.name}, {side}: "
                        f"TTFT p50 {cell['ttft_p50_ms']:.0f} p99 {cell['ttft_p99_ms']:.0f}, "
                        f"TPOT {cell['tpot_p50_ms']:.2f}, ITL p99 {cell['itl_p99_ms']:.1f} ms"
                    )
                    yield cell


def _server(
    stack: contextlib.ExitStack, name: ModelName, model_dir: Path, state_dir: Path, side: str
) -> ServerProcess:
    directory, ray_dir = stack.enter_context(new_directories(None))
    config = Path("serve_config.tiny.yaml" if name == "tiny" else "serve_config.yaml")
    settings = SIDES[side]
    if "training" not in settings:
        return plain_server(directory, config, model_dir, settings)
    sections = {"training": settings["training"]}
    if name == "half-b":
        sections["model"] = {"model_id": name, "model_source": str(model_dir), "max_model_len": 2048}
    models = None if name == "half-b" else state_dir / "models"
    return ServerProcess(directory, config, sections=sections, models=models, ray_dir=ray_dir)


def _ask(
    server: ServerProcess, model_dir: Path, load: Load, name: str, repeat: int, seconds: float
) -> dict[str, Any]:
    num_prompts = (
        max(8, round(load.rate_per_s * seconds))
        if load.rate_per_s is not None
        else (load.streams or 1) * (8 if name == "tiny" else 3)
    )
    energy = EnergyWatch()
    energy.idle()
    before, started_s = cpu_seconds(server.members()), time.monotonic()
    result = run_client(server.url, model_dir, load, num_prompts, seed=repeat + 1)
    elapsed_s = time.monotonic() - started_s
    energy.add(forward_s=elapsed_s)
    if result["failed"] or result["completed"] != num_prompts:
        raise MeasurementError(f"{num_prompts - result['completed']} of {num_prompts} requests failed")
    cores = cores_by_role(before, cpu_seconds(server.members()), elapsed_s)
    return {
        **{key: result[_field(key)] for key in _NUMBERS if key != "tokens_per_s"},
        "tokens_per_s": result["output_throughput"],
        "requests": num_prompts,
        "energy": energy.to_wire(result["total_output_tokens"], 0),
        "cores": {role: round(share, 3) for role, share in cores.items()},
    }


def _field(key: str) -> str:
    """`ttft_p50_ms` as vLLM's client calls it."""
    latency, percent, _ = key.split("_")
    return f"{percent}_{latency}_ms"


def run_client(url: str, model_dir: Path, load: Load, num_prompts: int, seed: int) -> dict[str, Any]:
    """vLLM's client on `/v1/completions`; its result, with latencies in milliseconds."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = [
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", str(model_dir), "--served-model-name", _served_name(url)),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
        *("--random-output-len", str(ANSWER_TOKENS), "--ignore-eos", "--num-prompts", str(num_prompts)),
        *("--seed", str(seed), "--disable-tqdm", "--temperature", "0"),
        *("--percentile-metrics", ",".join(_LATENCIES), "--metric-percentiles", "50,90,99"),
    ]
    if load.rate_per_s is not None:
        arguments += ["--request-rate", str(load.rate_per_s)]
    else:
        arguments += ["--max-concurrency", str(load.streams)]
    options: argparse.Namespace = parser.parse_args(arguments)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return dict(asyncio.run(main_async(options)))


def make_report(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each load and server, ratios to plain vLLM within one repeat, and the targets."""
    rows, checks = [], []
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["repeat"]):
        groups.setdefault((cell["model"], cell["load"]), {}).setdefault(cell["side"], []).append(cell)
    for (model, load), sides in groups.items():
        for side, repeats in sides.items():
            row: dict[str, Any] = {"model": model, "load": load, "side": side, "repeats": len(repeats)}
            for key in _NUMBERS:
                row[key] = statistics.median(cell[key] for cell in repeats)
                ratio = ratio_of(_pairs(repeats, sides.get(BASE, []), key))
                row[f"{key}_ratio"] = None if side == BASE or ratio is None else ratio.ratio
            joules = [cell.get("energy", {}).get("joules_per_1000_tokens") for cell in repeats]
            known = [value for value in joules if value is not None]
            row["joules_per_1000_tokens"] = statistics.median(known) if known else None
            roles = dict.fromkeys(role for cell in repeats for role in cell["cores"])
            row["cores"] = {
                role: round(statistics.median(cell["cores"].get(role, 0.0) for cell in repeats), 3)
                for role in roles
            }
            row["other_cores"] = sum(share for role, share in row["cores"].items() if role not in _ENGINE_ROLES)
            rows.append(row)
            if side.startswith("MACE") and BASE in sides:
                checks += _checks(row, sides)
    return {"versions": installed_versions(VERSIONED), "rows": rows, "checks": checks, "cells": list(cells)}


def _pairs(
    cells: Sequence[dict[str, Any]], bases: Sequence[dict[str, Any]], key: str
) -> list[tuple[float, float]]:
    """A value and plain vLLM's in the same repeat."""
    of_base = {cell["repeat"]: cell[key] for cell in bases}
    return [(cell[key], of_base[cell["repeat"]]) for cell in cells if cell["repeat"] in of_base]


def _checks(row: dict[str, Any], sides: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    name = f"{TITLES[row['model']]}, {row['load']}, {row['side']}"
    throughput, tpot = row["tokens_per_s_ratio"], row["tpot_p50_ms_ratio"]
    checks = [
        {"check": f"{name}: throughput", "value": throughput, "at_least": MIN_THROUGHPUT},
        {"check": f"{name}: TPOT p50", "value": tpot, "at_most": MAX_TPOT},
        {"check": f"{name}: cores beside the engine", "value": row["other_cores"], "at_most": MAX_OTHER_CORES},
    ]
    for key in ("ttft_p50_ms", "ttft_p99_ms"):
        base = statistics.median(cell[key] for cell in sides[BASE])
        at_most = max(MAX_TTFT, 1 + TTFT_ROOM_MS / base)
        checks.append({"check": f"{name}: {key[:8].upper()}", "value": row[f"{key}_ratio"], "at_most": at_most})
    if NO_LORA in sides:
        own = sides[row["side"]]
        ratio = ratio_of(_pairs(own, sides[NO_LORA], "tpot_p50_ms"))
        value = None if ratio is None else ratio.ratio
        checks.append(
            {"check": f"{name}: TPOT p50, without LoRA = 1", "value": value, "at_most": MAX_TPOT_WITHOUT_LORA}
        )
    for check in checks:
        value, low, high = check["value"], check.get("at_least", 0.0), check.get("at_most", math.inf)
        check["passed"] = None if value is None else bool(low <= value <= high)
    return checks


def _tables(report: dict[str, Any]) -> Iterator[Any]:
    columns: list[Column] = [("load", "load", str), ("server", "side", str)]
    for heading, key, number in (
        ("TTFT p50", "ttft_p50_ms", 0),
        ("p99", "ttft_p99_ms", 0),
        ("TPOT p50", "tpot_p50_ms", 2),
        ("ITL p50", "itl_p50_ms", 2),
        ("p99", "itl_p99_ms", 1),
        ("answer p50", "e2el_p50_ms", 0),
        ("tokens/s", "tokens_per_s", 0),
    ):
        columns += [(heading, key, digits(number)), ("ratio", f"{key}_ratio", digits(2))]
    columns += [("cores beside the engine", "other_cores", digits(2)), *JOULES]
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        yield table_of(f"{TITLES[model]} (ms)", rows, columns)
    yield checks_table("MACE beside plain vLLM", report["checks"])


def _served_name(url: str) -> str:
    return str(httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"])
