"""Whether the hub of models and data sets can be reached at all, found out once. Knows nothing of what lies there."""

import os
import socket
import sys
from contextlib import closing
from urllib.parse import urlsplit

REACHED_WITHIN = 10.0
"""Seconds."""


def look_for_hub() -> bool:
    """Whether the hub is to be asked. Where this machine does not reach it, its libraries are told to take what they
    have: left alone they try six times for every file, half a minute each, and say nothing meanwhile.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO", "OFF"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # whoever asks for us reaches it or not
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        with closing(socket.create_connection((place.hostname or "", port), REACHED_WITHIN)):
            return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if constants := sys.modules.get("huggingface_hub.constants"):
            constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        return False
