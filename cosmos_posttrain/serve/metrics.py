"""What the service has done, as Prometheus reads it.

Flows in: counts, from any thread. Flows out: text (exposition format 0.0.4).
"""

from __future__ import annotations

import threading
from collections import Counter

_PREFIX = "cosmos_serve"
ENDS = ("done", "failed", "cancelled")
REFUSALS = ("full", "size", "file", "settings")


class Metrics:
    """Counts since the start."""

    def __init__(self) -> None:
        self._jobs, self._refused = Counter[str](), Counter[str]()
        self._num_tokens, self._num_rounds, self._seconds = 0, 0, 0.0
        self._lock = threading.Lock()

    def count_job(self, state: str) -> None:
        """A clip came to its end, one of ``ENDS``."""
        with self._lock:
            self._jobs[state] += 1

    def count_refused(self, reason: str) -> None:
        """A request was refused, for one of ``REFUSALS``."""
        with self._lock:
            self._refused[reason] += 1

    def count_round(self, num_tokens: int, seconds: float) -> None:
        """Clips were generated together."""
        with self._lock:
            self._num_tokens += num_tokens
            self._num_rounds += 1
            self._seconds += seconds

    def text(self, num_waiting: int, num_running: int) -> str:
        """All of them, and what the queue holds now."""
        lines: list[str] = []

        def add(name: str, kind: str, text: str, values: dict[str, float]) -> None:
            lines.append(f"# HELP {_PREFIX}_{name} {text}")
            lines.append(f"# TYPE {_PREFIX}_{name} {kind}")
            lines.extend(
                f"{_PREFIX}_{name}{labels} {value:.15g}" for labels, value in values.items()
            )

        with self._lock:
            ended = {f'{{state="{state}"}}': float(self._jobs[state]) for state in ENDS}
            refused = {
                f'{{reason="{reason}"}}': float(self._refused[reason]) for reason in REFUSALS
            }
            add("clips_waiting", "gauge", "Clips in the queue.", {"": num_waiting})
            add("clips_running", "gauge", "Clips being generated.", {"": num_running})
            add("clips_total", "counter", "Clips that came to an end.", ended)
            add("refused_total", "counter", "Requests that were refused.", refused)
            add("tokens_total", "counter", "Tokens generated.", {"": self._num_tokens})
            add("rounds_total", "counter", "Rounds of generation.", {"": self._num_rounds})
            add("generation_seconds_total", "counter", "Time of rounds.", {"": self._seconds})
        return "\n".join(lines) + "\n"
