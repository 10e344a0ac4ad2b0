"""Probe the hub once, with a short timeout, before a library requests file after file with five retries each."""

from __future__ import annotations

from typing import Any

__all__ = ["hub_problem"]

_SECONDS = 5.0
"""Timeout after which the hub counts as unreachable."""

_answered: set[tuple[str, str]] = set()
"""(address, name) pairs that the hub has answered, which are not probed again."""


def hub_problem(name: str, *, repo_type: str = "model", token: Any = None) -> str | None:
    """Return why the hub cannot be reached for a model or data set; None if it answers, whatever the answer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    address = str(constants.ENDPOINT)
    if (address, name) in _answered:
        return None
    try:
        HfApi(endpoint=address).repo_info(name, repo_type=repo_type, token=token, timeout=_SECONDS)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError:
        pass  # the library reports a bad name better, with all arguments
    except Exception as error:  # connection errors differ between versions of the library
        return f"{address} does not answer ({' '.join(str(error).split()):.120})"
    _answered.add((address, name))
    return None
