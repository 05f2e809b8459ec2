"""Ray's own settings. It reads them when it is first imported, so they are made before anything imports it."""

import os

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it would run workers in an uploaded copy of this folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as there, every process of Ray binds to 127.0.0.1 alone


def settle(address: str | None) -> None:
    """Make Ray's settings for a sweep at --ray-address, this machine where there is none."""
    os.environ.update(QUIET)
    if address in (None, "local"):
        os.environ.update(LOOPBACK)
