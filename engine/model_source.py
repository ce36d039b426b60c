"""From `model.model_source` to a local directory that vLLM and the trainer both read."""

from pathlib import Path

from core.config import SMOLLM2, TINY_ASSISTANT, ModelConfig
from core.errors import ModelNotFoundError


def resolve_model(config: ModelConfig, state_dir: Path, *, show_progress: bool = False) -> Path:
    """Build, find or download the model; blocking.

    Raises:
        ModelNotFoundError: no such directory or hub id, or no network; the message says what to do.
    """
    source = config.model_source
    if source == SMOLLM2:
        from engine.smollm2.build import ensure_smollm2

        return ensure_smollm2(state_dir, show_progress=show_progress)
    if source == TINY_ASSISTANT:
        from engine.tiny.build import ensure_tiny_assistant

        return ensure_tiny_assistant(state_dir, show_progress=show_progress)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"model.model_source: {path} has no config.json; is it a Hugging Face model?")
        return path.resolve()
    if source.startswith(("/", ".", "~", "builtin:")):
        raise ModelNotFoundError(
            f"model.model_source: {source!r} is no directory. Give a Hugging Face id (Qwen/Qwen2.5-0.5B-Instruct), "
            f"a local directory, {SMOLLM2} or {TINY_ASSISTANT}"
        )
    return _download(source)


def find_model(config: ModelConfig, state_dir: Path) -> Path | None:
    """The directory of a model that is here already; nothing is built or fetched. None: it is not."""
    from huggingface_hub import snapshot_download

    source = config.model_source
    if source.startswith("builtin:"):
        built = (state_dir / "models").glob(f"{source.removeprefix('builtin:')}*/config.json")
        return max((path.parent for path in built), key=lambda path: path.stat().st_mtime, default=None)
    if (path := Path(source).expanduser()).is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def base_model_name(config: ModelConfig, model_dir: Path) -> str:
    """Name of the base model for people: the hub id, or the directory's name for local models."""
    is_local = config.model_source in (SMOLLM2, TINY_ASSISTANT) or Path(config.model_source).expanduser().is_dir()
    return model_dir.name if is_local else config.model_source


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelNotFoundError(
            f"model.model_source: no model {repo_id!r} on the Hugging Face hub (or it is private: set HF_TOKEN). "
            f"Check the spelling, or give a local directory or {TINY_ASSISTANT}"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"model.model_source: {repo_id!r} is not in the local cache and the hub cannot be reached. "
            f"Connect to the network once, or give a local directory or {TINY_ASSISTANT}"
        ) from error
