"""python -m pipeline.data data=c4: prepares a corpus where there is a network, before runs need it. Of
labelled samples it says what they are."""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir

from pipeline import samples
from pipeline.config import ConfigError, DataConfig, typed
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
        config = typed(compose("config", arguments))
    if config.data.source in samples.names():  # whatever the model
        print(_described(config.data))
        return 0
    config = complete(config)
    corpus = prepare(config.data, home() / "corpora", report=report, progress=sys.stdout.isatty())
    print(f"{corpus.train.size:,} tokens to train on, {corpus.validation.size:,} held out")
    return 0


def _described(data: DataConfig) -> str:
    if problems := samples.check(data):
        raise ConfigError(*problems)
    split = samples.read(data)
    shape = " × ".join(map(str, split.train.shape))
    return (
        f"{len(split.train_indices):,} samples of {shape} to train on, "
        f"{len(split.validation_indices):,} held out, {split.train.classes} classes"
    )


if __name__ == "__main__":
    sys.exit(main())
