"""The hub, asked once and for a short time, before a library asks for file after file with five retries each."""

from __future__ import annotations

from typing import Any

__all__ = ["hub_problem"]

_SECONDS = 5.0
"""How long the hub may take to answer before it counts as out of reach."""

_answered: set[tuple[str, str]] = set()
"""Names that the hub has answered for, with its address: it is asked once."""


def hub_problem(name: str, *, repo_type: str = "model", token: Any = None) -> str | None:
    """Say why the hub cannot be asked for a model or a data set; None where it answers, whatever the answer."""
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
        pass  # what is wrong with the name, the library says with all arguments in hand
    except Exception as error:  # of connections: the library changes its client between versions
        return f"{address} does not answer ({' '.join(str(error).split()):.120})"
    _answered.add((address, name))
    return None
