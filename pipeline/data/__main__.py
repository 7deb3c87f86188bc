"""python -m pipeline.data data=c4: prepares a corpus where there is a network, before runs need it."""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir

from pipeline.config import typed
from pipeline.data import prepare
from pipeline.identity import complete
from pipeline.overrides import CONF, run_command
from pipeline.store import home, report


def main() -> int:
    """Of the settings on the command line. The exit code: 0 all well, 2 the request is wrong."""
    arguments = sys.argv[1:]
    return run_command(lambda: _prepare(arguments), arguments)


def _prepare(arguments: list[str]) -> int:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        config = complete(typed(compose("config", arguments)))
    corpus = prepare(config.data, home() / "corpora", report=report, progress=sys.stdout.isatty())
    print(f"{corpus.train.size:,} tokens to train on, {corpus.validation.size:,} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
