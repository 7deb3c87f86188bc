"""Where Hydra finds the launchers, the sweeper and a user's own batch schedules; `launchers` and
`pipeline.batch` do the work.

Hydra imports this module at every start, so it imports nothing that takes time.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from pipeline.batch import _own as own_schedules
from pipeline.config import ConfigError, sweep_settings

if TYPE_CHECKING:
    from launchers.compose import Compose


class _Launcher(Launcher):
    """Composes the points of a sweep and hands them on; a nonzero exit code ends the process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._sweep_config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from launchers.compose import Composer

        compose = Composer(self._compose, sweep_settings(self._sweep_config).zip)
        if code := self._launch(job_overrides, compose):
            raise SystemExit(code)
        return []

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return self._loader.load_sweep_config(self._sweep_config, list(overrides))

    def _launch(self, jobs: Sequence[Sequence[str]], compose: Compose) -> int:
        raise NotImplementedError


class PreviewLauncher(_Launcher):
    def _launch(self, jobs: Sequence[Sequence[str]], compose: Compose) -> int:
        from launchers import preview

        return preview.launch(jobs, compose)


class LocalLauncher(_Launcher):
    def _launch(self, jobs: Sequence[Sequence[str]], compose: Compose) -> int:
        from launchers import local

        return local.launch(jobs, compose)


class SlurmLauncher(_Launcher):
    def _launch(self, jobs: Sequence[Sequence[str]], compose: Compose) -> int:
        from launchers import slurm

        return slurm.launch(jobs, compose)


def _launchers() -> list[str]:
    options = Path(__file__).resolve().parents[1] / "conf" / "hydra" / "launcher"
    return sorted(option.stem for option in options.glob("*.yaml"))


class ProductSweeper(BasicSweeper):
    """Hydra's grammar for sweeps, on each of the `rows`: points that are no product, such as those of a
    paper's table, "batch=constant batch.size=2048". Unlike its parent it composes nothing itself (the
    launcher composes every point anyway) and writes no multirun.yaml (the sweep's manifest holds more)."""

    def __init__(self, params: dict[str, str] | None = None, rows: list[str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)
        self._rows = [shlex.split(row) for row in rows or [""]]

    def sweep(self, arguments: list[str]) -> Any:
        from launchers.grammar import expand

        assert self.hydra_context is not None and self.launcher is not None and self.config is not None
        if not isinstance(self.launcher, _Launcher):  # it would train without a plan and a manifest
            chosen = self.config.hydra.runtime.choices["hydra/launcher"]
            raise ConfigError(
                f"hydra/launcher={chosen}: runs no sweeps here. Allowed: {', '.join(_launchers())}"
            )
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        for override in overrides:
            if not override.is_sweep_override():
                continue
            if not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line}: not a list of values. Allowed: a,b,c and range(start,stop,step)"
                )
            if not any(True for _ in override.sweep_string_iterator()):
                raise ConfigError(
                    f"{override.input_line}: gives no value, so there is nothing to run. glob(…) matches "
                    f"the options of a group, as in batch=glob(*)"
                )
        jobs = expand(overrides, sweep_settings(self.config).zip)
        # Of two values Hydra takes the last: what the command line says counts for every row.
        points = [[*row, *job] for row in self._rows for job in jobs]
        return self.launcher.launch(points, initial_job_idx=0)


class OwnSchedulesPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if own_schedules.options():
            search_path.append("own schedules", f"{OwnSchedules.scheme()}://")


class OwnSchedules(ConfigSource):
    """The group `batch` once more, of the files in CRESCENDO_SCHEDULES. One is executed when it is chosen."""

    @staticmethod
    def scheme() -> str:
        return "schedules"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "batch")

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return group == "batch" and name in own_schedules.options()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "" and results_filter != ObjectType.CONFIG:
            return ["batch"]
        return (
            own_schedules.options() if config_path == "batch" and results_filter != ObjectType.GROUP else []
        )

    def load_config(self, config_path: str) -> ConfigResult:
        name = config_path.removesuffix(".yaml").rpartition("/")[2]
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(own_schedules.option(name)),
            header={"package": None},
        )
