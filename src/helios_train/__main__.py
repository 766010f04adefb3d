"""The command line, `python -m helios_train` or `helios-train`: read strictly, hand the config to a task, exit with its code."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

if os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    # `python -m` puts the working directory first, where a folder `kernels` would hide Hugging Face's package of that name.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.getcwd()]

import hydra

from helios_train.conf import compose
from helios_train.errors import HeliosError

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERRUPTED = 130  # exit code after Ctrl-C where nothing was there to save


def main() -> None:
    """Run what `sys.argv` asks for. Exit codes: 0 done, 1 failed, 2 bad config or input, 130 / 143 saved after a signal."""
    with ExitStack() as stack:
        try:
            command = compose.check_arguments(sys.argv[1:])
        except HeliosError as error:
            _fail(error)
        if command.page is not None:
            print(command.page)
            return
        if command.needs_sweep_dir:  # Hydra's sweeper writes multirun.yaml whether one wants it or not
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="helios_train_"))
            sys.argv.append(f'hydra.sweep.dir="{scratch}"')
        hydra.main(config_path=f"pkg://{compose.MODULE}", config_name=compose.NAME, version_base=compose.VERSION)(job)()


def job(config: DictConfig) -> None:
    """One run. Hydra catches exceptions but not SystemExit: expected ends leave as exit codes, defects with a traceback and 1."""
    try:
        checked = compose.typed(config)
        from helios_train.tasks import run_task  # here: it imports torch, and --help must not

        run_task(checked, compose.plain(config))
    except HeliosError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("helios_train: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: HeliosError) -> NoReturn:
    print(f"helios_train: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
