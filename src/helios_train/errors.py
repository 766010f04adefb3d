"""Errors for people: each says what was wrong, where (file, key, sample) and what to do, and carries its exit code.

Exit codes: 0 done, 1 failed, 2 bad config or input, 130 / 143 saved after SIGINT / SIGTERM.
"""

from __future__ import annotations


class HeliosError(Exception):
    """A failure the user can read on one line; the process ends with `exit_code`."""

    exit_code = 1


class InputError(HeliosError):
    """What was handed in cannot be used: a file, a folder, a video, a checkpoint."""

    exit_code = 2


class ConfigError(InputError):
    """A config key that does not exist, or a value that is not allowed."""


class Preempted(HeliosError):
    """The run was asked to stop by a signal, and has saved a checkpoint; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, checkpoint: str):
        super().__init__(f"stopped by signal {signal_number} after saving {checkpoint}; resume=auto goes on from there")
        self.exit_code = 128 + signal_number
