"""python -m analysis SWEEP --publish: the report as a W&B Report beside the runs.

Its text is report.md. Where that shows curves, wandb draws them itself from the runs, in the colours of the
report. Published again, the same W&B Report is brought up to date: its id is in published.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from analysis import look
from analysis.online import unreachable
from analysis.render import render
from analysis.report import Report
from pipeline.config import ConfigError, did_you_mean
from pipeline.store import python, write_atomically

PUBLISHED = "published.json"  # the id of the W&B Report by ENTITY/PROJECT
_FIGURE = re.compile(r"!\[[^\n]*\]\(figures/(\w+)\.png\)\n*")
_CURVES = {  # figure: what wandb draws in its place, and whether on a logarithmic axis
    "optimality_gap": ("exact/gap", True),
    "gradient_norm": ("exact/grad_norm", True),
    "validation_loss": ("val/loss", True),
    "validation_accuracy": ("val/accuracy", False),
    "training_loss": ("train/loss", True),
    "batch_size": ("batch/size", True),
    "noise_scale": ("stat/noise_scale", True),
    "throughput": ("throughput/tokens_per_s", False),
}
_TITLE_LENGTH = 128  # wandb takes no longer one


def publish(report: Report, folder: Path, place: str) -> str:
    """Writes the W&B Report into the project `place`, ENTITY/PROJECT or PROJECT; "" means where the runs are.

    The address of the report. `folder`: where its other files are. Raises ConfigError when the runs are in
    several projects, and with what wandb says when it refuses.
    """
    if not any(run.config for run in report.runs):
        raise ConfigError("--publish: only of a sweep, whose runs wandb finds by their ids, not of a study")
    server = os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)
    if reason := unreachable(server):
        raise ConfigError(f"--publish: {server} is out of reach from here ({reason})")
    kept = folder / PUBLISHED
    published: dict[str, str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    with _wandb_errors(kept):
        api = wandb.Api()
        default_entity = str(api.default_entity)
    entity, project = _place(report, place, default_entity)
    with _wandb_errors(kept):
        projects = [each.name for each in api.projects(entity)]
    if project not in projects:  # else one would be made, and its charts would be empty
        raise ConfigError(
            f"--publish: wandb has no project {entity}/{project}." + did_you_mean(project, projects),
            f"Offline runs are sent by: {python()} -m launchers sync {report.sweep.name}",
        )
    found = wr.Report(
        entity=entity,
        project=project,
        title=f"{report.sweep.name}: batch-size schedules compared"[:_TITLE_LENGTH],
        description=report.headline,
        blocks=_blocks(report, entity, project),
        width="fluid",
    )
    found.id = published.get(f"{entity}/{project}", "")
    with _wandb_errors(kept):
        found.save()
        address: str = found.url
    write_atomically(kept, json.dumps({**published, f"{entity}/{project}": found.id}, indent=1) + "\n")
    return address


@contextlib.contextmanager
def _wandb_errors(kept: Path) -> Iterator[None]:
    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError) as error:
        known = f" If the W&B Report was deleted there: remove {kept}." if kept.exists() else ""
        raise ConfigError(
            f"--publish: wandb refuses: {' '.join(str(error).split())}. `wandb login` asks for an account."
            f"{known}"
        ) from None


def _place(report: Report, place: str, default_entity: str) -> tuple[str, str]:
    if place:
        entity, _, project = place.rpartition("/")
        return entity or default_entity, project
    tracks = {(run.config.track.entity, run.config.track.project) for run in report.runs if run.config}
    if len(tracks) != 1:
        places = ", ".join(sorted(f"{owner or default_entity}/{name}" for owner, name in tracks))
        raise ConfigError(
            f"--publish: the runs are in {len(tracks)} projects of wandb ({places or 'none is known'}). "
            f"Name one: --publish ENTITY/PROJECT"
        )
    ((owner, project),) = tracks
    return owner or default_entity, project


def _blocks(report: Report, entity: str, project: str) -> list[Any]:
    """report.md, with wandb's charts in the place of the figures it can draw itself."""
    words, *rest = _FIGURE.split(render("report.md.j2", report))
    blocks: list[Any] = [wr.TableOfContents(), wr.MarkdownBlock(text=words)]
    for figure, caption in zip(rest[::2], rest[1::2], strict=True):
        if figure in _CURVES:
            blocks.append(_chart(report, entity, project, *_CURVES[figure]))
        blocks.append(wr.MarkdownBlock(text=caption))
    return blocks


def _chart(report: Report, entity: str, project: str, metric: str, logarithmic: bool) -> wr.PanelGrid:
    colors = dict(zip(report.labels, look.colors("light", len(report.labels)), strict=True))
    runs = {run.id: (run, colors[report.label_of(run)]) for run in report.runs if run.id}
    # A run has one entry in wandb for each attempt.
    settings = {
        f"{id_}-a{attempt}": wr.RunSettings(color=color)
        for id_, (run, color) in runs.items()
        for attempt in range(1, (run.status.attempt if run.status else 0) + 1)
    }
    ids = ", ".join(f"'{id_}'" for id_ in runs)
    return wr.PanelGrid(
        runsets=[
            wr.Runset(
                entity=entity,
                project=project,
                name=report.sweep.name,
                filters=f"Config('run') in [{ids}]",
                run_settings=settings,
            )
        ],
        panels=[
            wr.LinePlot(
                title=f"{metric} over {axis}",
                x=axis,
                y=[metric],
                log_y=logarithmic,
                max_runs_to_show=len(settings),
                layout=wr.Layout(x=8 * place, y=0, w=8, h=8),
            )
            for place, axis in enumerate(("tokens", "step", "time"))
        ],
    )
