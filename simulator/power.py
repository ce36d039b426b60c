"""Power of an executor's devices, and the joules that a run takes by it.

While one device works the other idles; of slices only AdamW's may be the CPU's beside a GPU.
`E = Σ idle_w·T + (forward_w - idle_w)·F + (training_w - idle_w)·S` over the devices, with `T` the length of the run and
`F`, `S` the seconds for which a device ran forward passes and slices.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.batch import ForwardShape
from core.config import AppArgs
from core.errors import ConfigError
from core.offload import Place, WorkCost, WorkKind
from profiler.profile import Profile
from scheduler.offload import Placement, place_work, slack_of


class DevicePower(BaseModel):
    """Watts of one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    idle_w: float = Field(ge=0, allow_inf_nan=False)
    forward_w: float = Field(ge=0, allow_inf_nan=False)
    """While it runs a forward pass."""
    training_w: float = Field(ge=0, allow_inf_nan=False)
    """While it runs a slice."""

    @model_validator(mode="after")
    def _idling_is_least(self) -> "DevicePower":
        if self.idle_w > min(self.forward_w, self.training_w):
            raise ValueError("idle_w must not be above forward_w or training_w")
        return self


class Power(BaseModel):
    """Watts of an executor: of its CPU, and of its GPU if that is where the engine runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: DevicePower
    gpu: DevicePower | None = None

    @classmethod
    def load(cls, path: Path) -> "Power":
        """Read a YAML file; ConfigError names it if it cannot be read or is wrong."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"power {path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(
                f"power {path} is wrong: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error

    @property
    def engine(self) -> DevicePower:
        """The device of the engine."""
        return self.gpu or self.cpu

    @property
    def idle_w(self) -> float:
        """All devices at rest."""
        return self.cpu.idle_w + (self.gpu.idle_w if self.gpu else 0.0)

    def spent(self, virtual_s: float, forward_s: float, slices_s: float, moved_s: float) -> "Spent":
        """Joules of executors that together ran for so long, with so many seconds of forward passes and of slices.

        `moved_s` are those of slices that the CPU ran beside the engine's device.
        """
        engine, cpu = self.engine, self.cpu
        here_j = (engine.training_w - engine.idle_w) * (slices_s - moved_s)
        return Spent(
            idle_j=self.idle_w * virtual_s,
            serving_j=(engine.forward_w - engine.idle_w) * forward_s,
            training_j=here_j + (cpu.training_w - cpu.idle_w) * moved_s,
        )


def place_optimizer(power: Power | None, profile: Profile, args: AppArgs) -> Placement:
    """Where AdamW runs, as in `engine.training.offload`; power that is given replaces what the profile measured."""
    costs = dict(profile.work.get(WorkKind.OPTIMIZER, {}))
    if not costs:
        return Placement("engine", "the profile has no GPU and CPU to choose from")
    if power is not None:
        devices: dict[Place, DevicePower] = {"engine": power.engine, "cpu": power.cpu}
        costs = {
            place: WorkCost(cost.seconds, devices[place].training_w - devices[place].idle_w)
            for place, cost in costs.items()
        }
    slack_s = slack_of(args, profile.latency.forward_s(ForwardShape(num_decode=1)))
    return place_work(args.offload.optimizer, costs, slack_s)


@dataclass(frozen=True, slots=True)
class Spent:
    """Joules of a run; those of serving and training are over idle, as in `profiler.energy_account`."""

    idle_j: float
    serving_j: float
    training_j: float

    @property
    def total_j(self) -> float:
        """All of them."""
        return self.idle_j + self.serving_j + self.training_j
