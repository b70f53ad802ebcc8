"""The hub of models and data sets, before it is asked for one: does a way lead there?

Its own client tries a connection that cannot be made six times, for half a minute, and some models more than
once. Whatever else is slow or fails stays its business.
"""

from __future__ import annotations

import time

TRIES = 3
WAIT = 1.0  # seconds between two tries
# By name: the client's HTTP library, whose types these are, is another one in another version.
NO_CONNECTION = {"ConnectError", "ConnectTimeout"}


def unreachable(name: str, *, repo_type: str = "model", revision: str | None = None) -> str:
    """Why the hub cannot be asked for something that its cache does not hold.

    A connection that is refused, or a host that nobody knows, is tried again after a second; silence is not:
    ``HF_HUB_ETAG_TIMEOUT`` says how long that may last. One that is made, however slow, is fine.

    Args:
        name: owner/name.
        repo_type: ``model`` or ``dataset``.
        revision: branch, tag or commit.

    Returns:
        What is wrong with the connection; empty if the hub can be reached, need not be, or must not be.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode() or is_cached(name, repo_type=repo_type, revision=revision):
        return ""
    url = hf_hub_url(name, "README.md", repo_type=repo_type, revision=revision)
    for left in reversed(range(TRIES)):
        try:
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return ""
        except Exception as error:
            failure = {kind.__name__ for kind in type(error).__mro__} & NO_CONNECTION
            if not failure:
                return ""  # an answer, though it may be a refusal: the client says which when it is asked
            if not left or "ConnectTimeout" in failure:
                return f"no connection to {constants.ENDPOINT}: {error}"
        time.sleep(WAIT)
    return ""


def is_cached(name: str, *, repo_type: str = "model", revision: str | None = None) -> bool:
    """Whether the hub's cache holds something of a repository, whole or not."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, repo_type=repo_type, revision=revision, local_files_only=True)
    except OSError:  # there is none, or it cannot be read
        return False
    return True
