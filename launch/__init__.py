"""Launchers: thin command lines over the package."""

from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a launcher's main. Libraries' progress notes show only with --verbosity 0 or more."""

    def quiet(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        main(argv)

    app.run(quiet)
