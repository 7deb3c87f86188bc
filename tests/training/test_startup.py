"""What stands between a command and its first step: no import that the step has no use for, no port that
somebody else can take, and no row lost for wandb's coming later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import rendezvous
from pipeline.optim._uncompiled import uncompiled
from pipeline.store import RunDirectory
from tests.support import ROOT, config
from tests.training.test_worker import inspected

SMALL = [
    "data.sequence_length=64", "batch.size=16", "lr.warmup_tokens=1k", "eval.sequences=8", "budget.tokens=4k",
]  # fmt: skip


def python(code: str, *arguments: str, timeout_s: float = 240, **environment: str) -> str:
    """What a new process prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


COMMAND = """
import json, sys
import pipeline.__main__
assert pipeline.__main__.main() == 0
print(json.dumps([name for name in ("torch", "wandb", "submitit") if name in sys.modules]))
"""


def test_the_command_and_the_supervisor_of_a_run_import_no_torch(home: Path, small_corpus: list[str]):
    """Through a whole run: the frozen directory, the data, a rank, its end."""
    printed = python(COMMAND, *SMALL, *small_corpus, "parallel=ddp")
    assert "DONE" in printed and json.loads(printed.splitlines()[-1]) == []


STEP = """
import os, sys
from tests.support import config
composed = config(*sys.argv[1:])
for name in [name for name in sys.modules if name.split(".")[0] == "hydra"]:
    del sys.modules[name]  # which composed the config; a rank reads it from its file
os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from pipeline.worker import RunDirectory
from pipeline.parallel._ranks import process_group
from pipeline.train import Trainer
with process_group(composed) as ranks:
    trainer = Trainer(composed, RunDirectory.of(composed), 1, ranks)
    trainer.resume()
    trainer.step()
    unwanted = ["torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.elastic",
                "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "wandb", "transformers", "hydra"]
    print("imported:", *[name for name in unwanted if name in sys.modules])
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize(
    "overrides", [["parallel=single"], ["parallel=ddp", "parallel.replicate=1"], ["batch=norm_test"]], ids=str
)
def test_a_first_step_imports_what_it_needs(overrides: list[str], home: Path, small_corpus: list[str]):
    printed = python(STEP, *SMALL, *small_corpus, *overrides)
    assert printed.splitlines()[-1] == "imported:"


BUILD = """
import sys
import torch
from torch import nn
from pipeline import optim
from tests.support import config
for name in sys.argv[1:]:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 4))
    optimizer = optim.build(model, config(f"optim={name}", "optim.clip=null").optim)
    model(torch.arange(7)).square().mean().backward()
    if name not in ("adagrad_norm", "backtracking"):  # which step with an evaluation
        optimizer.step()
    optimizer.zero_grad()
    assert "torch._dynamo" not in sys.modules, name
"""


def test_no_optimizer_imports_the_compiler():
    names = ["adamw", "adam", "adagrad", "sgd", "muon", "signum", "adamp", "prox_sgd", "adagrad_norm"]
    python(BUILD, *names, "backtracking")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
        (torch.optim.Adam, {"lr": 0.01, "fused": True}),
        (torch.optim.Adagrad, {"lr": 0.01, "foreach": True}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "foreach": True}),
        (torch.optim.Muon, {"lr": 0.01, "momentum": 0.9}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_the_compiler_the_arithmetic_is_torchs_own(kind: type[torch.optim.Optimizer], settings: dict):
    weights = []
    for made in (kind, uncompiled(kind)):
        torch.manual_seed(0)
        model = nn.Linear(5, 3, bias=False)
        optimizer = made(model.parameters(), **settings)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
        weights.append(model.weight.detach().clone())
        assert isinstance(optimizer, kind) and model.weight.requires_grad
    assert weights[0].equal(weights[1])


MEET = """
import os, sys
from datetime import timedelta
from pipeline import rendezvous
store = rendezvous.store(timedelta(seconds=60))
store.set(os.environ["RANK"], "here")
print(store.get(str(1 - int(os.environ["RANK"]))).decode(), store.port)
store.set("left" + os.environ["RANK"], "")
store.wait(["left0", "left1"])
"""


@pytest.mark.parametrize("host", ["127.0.0.1", None])
def test_ranks_meet_on_a_socket_that_listens_before_they_start(host: str | None):
    """Rank 1 first, which finds nobody who answers yet; and nobody else can have the port."""
    with rendezvous.listen(host) as listener:
        port = listener.getsockname()[1]
        ranks = []
        for rank in (1, 0):
            inherited = listener.fileno() if rank == 0 else None
            place = rendezvous.Place(rank, 2, rank, 2, "127.0.0.1", port)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **rendezvous.variables(place, inherited)}
            passed = () if inherited is None else (inherited,)
            command = [sys.executable, "-c", MEET]
            pipe = subprocess.PIPE
            ranks.append(subprocess.Popen(command, env=environment, pass_fds=passed, stdout=pipe, text=True))
            time.sleep(0.5)
        with pytest.raises(OSError):
            rendezvous.socket.create_server((host or "", port))
    try:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert printed == [f"here {port}\n"] * 2


ROWS = """
import sys
from pipeline.store import RunDirectory
from pipeline.track import Tracker
run = RunDirectory(sys.argv[1])
tracker = Tracker(run.config(), run, 1)
for step in range(1, 1001):
    tracker.log({"step": step, "tokens": step, "train/loss": 1 / step})
print("wandb" in sys.modules)
tracker.finish(0)
"""


def test_rows_that_come_before_wandb_is_up_are_mirrored_too(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE")
    composed = config("track.every=1")
    run = RunDirectory.of(composed)
    run.freeze(composed)
    python(ROWS, str(run.path))
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    assert inspected(file).count("train/loss") >= 1000
