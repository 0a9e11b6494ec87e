"""Can an engine get at a model's weights: in a folder, in the Hugging Face cache, or from the hub?"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "https://huggingface.co"
TIMEOUT_S = 8.0
YES = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Access:
    """Whether the weights are here (``here``), can be fetched (``reachable``), and what to say of it."""

    here: bool
    reachable: bool
    found: str
    mend: str = ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token must not follow a redirect to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def model_access(model: str) -> Access:
    """Access to ``model``, a folder or the hub's name of it. The token is in no text."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if lacking := _lacking(folder):
            return Access(False, False, f"{folder} lacks {lacking}", "fetch the whole model")
        return Access(True, True, f"in {folder}")
    if folder.is_absolute():
        return Access(False, False, f"there is no folder {folder}", "correct server.launch.model")
    cache = hub_cache()
    why = "is not in it"
    for snapshot in sorted((cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*")):
        lacking = _lacking(snapshot)
        if lacking is None:
            return Access(True, True, f"{model} is in {cache}")
        why = f"is there in part, without {lacking}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in YES:
        return Access(
            False,
            False,
            f"HF_HUB_OFFLINE is set, and in {cache} {model} {why}",
            "unset it, or copy the model there",
        )
    return _on_the_hub(model)


def hub_cache() -> Path:
    """Where the hub's models are kept, by the hub's own variables."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given)
    return _hub_home() / "hub"


def _hub_home() -> Path:
    if given := os.environ.get("HF_HOME"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def _lacking(folder: Path) -> str | None:
    """What a model's folder lacks to be served; None if nothing."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return next((name for name in names if not (folder / name).is_file()), None)
    whole = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return None if whole else "weights (*.safetensors)"


def _token() -> str | None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if given := os.environ.get(name, "").strip():
            return given
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
    return (file.read_text().strip() or None) if file.is_file() else None


def _on_the_hub(model: str) -> Access:
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    token = _token()
    said = "a token was found" if token else "there is no token"
    request = urllib.request.Request(f"{hub}/{model}/resolve/main/config.json", method="HEAD")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError as error:
        why = f"{hub} does not answer: {getattr(error, 'reason', error)}"
        mend = "give this machine a way there (HTTPS_PROXY, HF_ENDPOINT), or copy the model there"
        return Access(False, False, f"{model} is not in {hub_cache()}, and {why}", mend)
    if status < 400:
        mend = f"fetch it before the first start: hf download {model} --exclude 'original/*'"
        return Access(False, True, f"{model} can be fetched from {hub} ({said})", mend)
    if status in (401, 403):
        mend = (
            f"accept its licence at {hub}/{model} and export HF_TOKEN with a token that may read it"
        )
        return Access(False, False, f"{hub} answers {status} for {model} ({said})", mend)
    return Access(
        False, False, f"{hub} answers {status} for {model}", "correct server.launch.model"
    )
