"""Whether the model hub can be reached."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request


class Hub:
    """One HEAD request to the model hub, started at once and given three seconds: it can be late, it cannot hang."""

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds, self.reached = seconds, False
        self.offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
        self.thread = threading.Thread(target=self.probe, daemon=True)
        if not self.offline:
            self.thread.start()

    def probe(self) -> None:
        from huggingface_hub import constants

        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=self.seconds):
                self.reached = True
        except urllib.error.HTTPError:
            self.reached = True  # it answers, if not with a page
        except (OSError, ValueError):
            self.reached = False

    def answer(self) -> str:
        """One line about the hub."""
        if self.offline:
            return "hub: switched off by HF_HUB_OFFLINE; only local files are used"
        self.thread.join(self.seconds)
        return "hub: reachable" if self.reached else "hub: not reachable (offline); only local files are used"
