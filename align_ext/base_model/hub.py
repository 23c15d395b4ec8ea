"""Asks the hub, without waiting long for it."""

import threading

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url


def ask_hub(
    name: str,
    file: str = "config.json",
    repo_type: str | None = None,
    seconds: float = 4.0,
    revision: str | None = None,
) -> Exception | None:
    """Asks the hub for a file of a repository; returns None if it is available in time, else the reason."""
    if constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set")
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            url = hf_hub_url(name, file, repo_type=repo_type, revision=revision)
            get_hf_file_metadata(url, timeout=seconds)
        except Exception as error:  # any exception is the reason
            answer.append(error)
        else:
            answer.append(None)

    # A thread, because HTTP timeouts do not cover a hanging DNS lookup; a daemon, so that exit does not wait for it.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0] if answer else TimeoutError(f"no answer within {seconds:g} s")
