"""The exception tree of MACE. Foreign exceptions are mapped to these where they enter, and nowhere else."""


class MaceError(Exception):
    """Base of every error that MACE raises on purpose."""


class ConfigError(MaceError):
    """A setting is wrong; the message says which one and what to do. Raised at start, before anything is loaded."""


class ModelNotFoundError(ConfigError):
    """The configured model id or path cannot be resolved."""


class FeedbackError(MaceError):
    """A feedback record is refused; `param` is the key that is wrong, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidFeedbackError(FeedbackError):
    """The record is malformed, empty, or its two responses are equal (HTTP 400 or 422)."""


class ConflictError(MaceError):
    """What is asked for does not go with what is the case now; the message says why (HTTP 409)."""


class UnknownResponseError(FeedbackError):
    """The record names a response id that is not in the response store (HTTP 404)."""


class ResponseNotReadyError(FeedbackError):
    """The record names a response whose request still runs; it may be repeated (HTTP 409)."""


class StoreUnavailableError(MaceError):
    """The feedback store cannot be read or written at the moment (HTTP 503)."""


class ControlUnavailableError(MaceError):
    """Control is down, restarting or too slow; serving goes on, and the call may be repeated (HTTP 503)."""


class EngineUnavailableError(MaceError):
    """The engine died and is being started again; the request may be repeated (HTTP 503)."""


class AdapterError(MaceError):
    """An adapter version cannot be used."""


class UnknownVersionError(AdapterError):
    """No adapter version of that name exists (HTTP 404)."""


class DamagedAdapterError(AdapterError):
    """The adapter directory is incomplete, unreadable or does not fit the model."""


class UnfitAdapterError(DamagedAdapterError):
    """The adapter is whole, and was trained for another base model than the one that is served."""


class TrainingError(MaceError):
    """A fine-tune task failed; serving goes on."""


class DivergedError(TrainingError):
    """The loss or a gradient became NaN, infinite or too large; the step was discarded."""


class DeviceMemoryError(TrainingError):
    """A slice ran out of device memory; the step was discarded."""


class PairTooLongError(TrainingError):
    """A preference pair does not fit the configured lengths."""


class UnsupportedModelError(TrainingError):
    """The model's architecture cannot be trained layer by layer, or its weights are quantized in an unknown way."""


class LedgerError(MaceError):
    """The books of device memory do not balance, or were asked for the impossible."""


class ProfileError(MaceError):
    """A profile is missing, damaged or of an unknown version, or there are too few samples to fit one."""
