"""The device on which a kind of background work takes the least energy within the latency targets."""

from collections.abc import Mapping
from dataclasses import dataclass

from core.config import AppArgs
from core.offload import Offload, Place, WorkCost


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a kind of work runs, and the reason in words."""

    place: Place
    reason: str


def place_work(setting: Offload, costs: Mapping[Place, WorkCost], slack_s: float) -> Placement:
    """Choose between the engine's device and the CPU.

    Of the devices on which the work fits into `slack_s`, the time that a forward pass leaves of the TBT target, the one
    of fewest joules is taken; if it fits on none, the faster one. What is not known does not move.
    """
    if setting == "never":
        return Placement("engine", "the setting is never")
    if setting == "always":
        return Placement("cpu", "the setting is always")
    if not {"engine", "cpu"} <= costs.keys():
        return Placement("engine", "not measured on both devices: `mace profile measure` does it")
    fitting: list[Place] = [place for place, cost in costs.items() if cost.seconds <= slack_s]
    times = f"{_ms(costs['engine'].seconds)} here and {_ms(costs['cpu'].seconds)} on the CPU"
    if not fitting:
        faster = min(costs, key=lambda place: costs[place].seconds)
        return Placement(faster, f"the targets leave {_ms(slack_s)}, and it takes {times}")
    if len(fitting) == 1:
        return Placement(fitting[0], f"only there it fits into the {_ms(slack_s)} that the targets leave: {times}")
    joules = {place: cost.seconds * cost.watts for place, cost in costs.items() if cost.watts is not None}
    if len(joules) < 2:
        return Placement("engine", "its energy was not measured: there was no sensor")
    best: Place = "cpu" if joules["cpu"] < joules["engine"] else "engine"
    return Placement(best, f"it takes {joules['engine']:.3g} J here and {joules['cpu']:.3g} J on the CPU")


def slack_of(args: AppArgs, forward_s: float) -> float:
    """What a forward pass of this length leaves of an iteration's part of the TBT target."""
    return args.scheduler.slack_fraction * args.slo.tbt_s - forward_s


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
