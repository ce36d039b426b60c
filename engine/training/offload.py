"""Where the trainer's movable work runs, and what it costs on the engine's device and on the CPU."""

import time
from collections.abc import Callable

import torch

from core.batch import ForwardShape
from core.config import AppArgs
from core.errors import ProfileError
from core.offload import Place, WorkCost, WorkKind
from engine.training.optimizer import FlatAdamW
from engine.training.trainable import training_mode
from profiler.energy import EnergyMeter
from profiler.profile import Profile
from scheduler.offload import Placement, place_work, slack_of

_MEASURE_S = 1.0
"""Long enough for sensors that count ten times a second."""
_WARM_UPS = 3
Costs = dict[WorkKind, dict[Place, WorkCost]]


def place_all(args: AppArgs, device: torch.device) -> dict[WorkKind, Placement]:
    """Where each kind runs, by its setting and by the profile of `args.profile.path` if there is one."""
    if device.type == "cpu":
        nothing = Placement("engine", "the engine runs on the CPU: there is nothing to move")
        return dict.fromkeys(WorkKind, nothing)
    costs, slack_s = _known(args)
    placed = {kind: place_work(getattr(args.offload, kind), costs.get(kind, {}), slack_s) for kind in WorkKind}
    if placed[WorkKind.OPTIMIZER].place == "cpu":
        placed[WorkKind.CHECKPOINT] = Placement("cpu", "the optimizer is there")
    return placed


def measure_work(like: torch.Tensor, args: AppArgs, meter: EnergyMeter, measure_s: float = _MEASURE_S) -> Costs:
    """What each kind costs with as many parameters as `like` on its device and on the CPU; nothing is changed."""
    device, cpu = like.device, torch.device("cpu")
    with training_mode(device):
        _, idle_w = _cost(lambda: time.sleep(measure_s), device, meter, 0.0)

        def cost(work: Callable[[], None]) -> WorkCost:
            for _ in range(_WARM_UPS):
                work()
            seconds, watts = _cost(work, device, meter, measure_s)
            return WorkCost(seconds, None if watts is None or idle_w is None else max(0.0, watts - idle_w))

        gradients = torch.full_like(like, 1e-3)
        steps: dict[Place, WorkCost] = {
            "engine": cost(_step(like, args, None, gradients)),
            "cpu": cost(_step(like, args, cpu, gradients)),
        }
        copies: dict[Place, WorkCost] = {
            "engine": cost(_copy(like, args, None)),
            "cpu": cost(_copy(like, args, cpu)),
        }
    return {WorkKind.OPTIMIZER: steps, WorkKind.CHECKPOINT: copies}


def _step(
    like: torch.Tensor, args: AppArgs, device: torch.device | None, gradients: torch.Tensor
) -> Callable[[], None]:
    """As in `ShadowAdapter.apply`: a copy to go back to, the step, the new parameters."""
    optimizer = FlatAdamW(like.clone(), args.training, device)
    copies = optimizer.empty_tensors()

    def step() -> None:
        for name, tensor in optimizer.tensors().items():
            copies[name].copy_(tensor)
        optimizer.step(gradients)
        optimizer.give_out()

    return step


def _copy(like: torch.Tensor, args: AppArgs, device: torch.device | None) -> Callable[[], None]:
    """A copy of the state of an optimizer on the engine's device, and what the file is written from, on the CPU."""
    optimizer = FlatAdamW(like.clone(), args.training)
    copies = optimizer.empty_tensors(device)

    def copy() -> None:
        for name, tensor in optimizer.tensors().items():
            copies[name].copy_(tensor)
            copies[name].cpu()  # nothing to do if it is there

    return copy


def _cost(
    work: Callable[[], None], device: torch.device, meter: EnergyMeter, measure_s: float
) -> tuple[float, float | None]:
    """Seconds of a piece of work, which is done again and again for `measure_s`, and the machine's power meanwhile.

    The power is None unless sensors see CPU and GPU: with one of them alone the other would seem to work for nothing.
    """
    count, before_j, started_s = 0, sum(meter.read().values()), settled_s(device)
    while not count or time.perf_counter() - started_s < measure_s:
        work()
        ended_s = settled_s(device)
        count += 1
    taken_j = sum(meter.read().values()) - before_j
    sees_all = "ina" in meter.sensors or {"rapl", "nvml"} <= set(meter.sensors)
    return (ended_s - started_s) / count, taken_j / (ended_s - started_s) if sees_all else None


def _known(args: AppArgs) -> tuple[Costs, float]:
    """Costs of the profile, and what a forward pass of one token leaves of the TBT target."""
    path = args.profile.path
    if path is None or not path.exists():
        return {}, 0.0
    try:
        profile = Profile.load(path)
    except ProfileError:  # the executor's start says so
        return {}, 0.0
    return profile.work, slack_of(args, profile.latency.forward_s(ForwardShape(num_decode=1)))


def settled_s(device: torch.device) -> float:
    """`time.perf_counter` once the device has done all that it was given: work is timed, and not its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
