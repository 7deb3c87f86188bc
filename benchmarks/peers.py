"""Our trainer beside others on the same work: tokens per second, memory, start-up.

    python -m benchmarks.peers [--starts 2] [--turns 4] [--only olmo_core hand_written]
                               [--layouts single ddp fsdp] [--environment DIRECTORY] [--json]

The peers (benchmarks/peer_trainers, one file each) are OLMo-core, Hugging Face's Trainer, Lightning Fabric
and a loop in one file as nanoGPT's; ours is `python -m pipeline`, with its record and its supervisor. They
are installed into a virtual environment of the benchmark's own, ours with them, so that all run on one torch.

The work is equal: a Llama of one shape, the same initial weights and tokens, float32, AdamW with the same
settings, clipping, the same micro-batches and threads. That it is shows in the losses: no ratio is given for
a peer whose loss at any step differs from ours by more than float32 rounding explains.

Each trainer is processes of its own, measured from outside: it leaves a row with the time after each step,
as our record does. All are started, one after another, and stopped (SIGSTOP) after a few steps. Then they
take turns, in random order, of a few steps each while the others are stopped, so that a drift of the machine
hits all alike: a shared machine drifts by a fifth within minutes. At the end the peak memory of the largest
process of each is read from /proc. The figures are medians over turns of the ratios within a turn, with
their quartiles. Exit code 1 when the fastest peer is not beaten as the target says, or a peer's work was not
equal.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_mib
from benchmarks.peer_trainers._task import Shape, Task
from benchmarks.printing import beside_json, print_json
from pipeline.config import Config, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
PEERS = ("olmo_core", "hf_trainer", "fabric", "hand_written")
LAYOUTS = {"single": 1, "ddp": 2, "fsdp": 2}  # processes
LACKING = {("fsdp", "hf_trainer")}  # accelerate shards on GPUs alone, and on CPUs runs DDP without a word
INSTALLED = ("ai2-olmo-core==3.0.0", "accelerate==1.15.0", "lightning-fabric==2.6.6", "transformers")
NOT_PINNED = ("rich",)  # OLMo-core's cached-path wants an older one than constraints.txt names

# 4,096 tokens in the vocabulary: at this width the head has the share of the matrix products that it has in a
# model of 300M parameters with 32,000.
WORK = (
    "model=10m",
    "model.vocab=4096",
    "data.sequence_length=256",
    "data.micro_batch=4",
    "batch.size=16",
    "budget.tokens=1B",
    "optim.lr=1e-3",
    "lr=warmup_stable_decay",  # constant, as far as this goes
    "lr.warmup_tokens=0",
    "track=disabled",
)
WARM_UP = 3  # steps, after each start
TIMED = 3  # steps of each turn; a turn begins within a step, which is not timed
COMPARED = 11  # steps whose losses must be equal
TIMEOUT_S = 600.0
LOSS_TOLERANCE = 1e-4  # relative; float32 in another order is off by 1e-6 at first, and the difference grows
TARGET = 1.1


# --- the work ---------------------------------------------------------------------------------------------


def prepare(directory: Path, steps: int) -> Task:
    """Writes the tokens of so many steps and the initial weights, and our corpus, of which the tokens are."""
    os.environ["CRESCENDO_HOME"] = str(directory)
    from pipeline.data import Stream
    from pipeline.data import prepare as prepare_corpus
    from pipeline.model.init import initialise
    from pipeline.model.llama import Llama
    from tests.support import config

    composed: Config = config(*WORK)
    model, optim = composed.model, composed.optim
    assert isinstance(model, LlamaConfig) and optim.clip is not None
    shape = Shape(**{name: getattr(model, name) for name in Shape.__dataclass_fields__})
    corpus = prepare_corpus(composed.data, directory / "corpora")
    stream = Stream(corpus.train, composed.data.sequence_length, composed.data.seed)
    np.save(directory / "tokens.npy", stream.read(0, steps * composed.batch.size).astype(np.uint16))
    llama = Llama(model)
    initialise(llama, composed.seed)
    np.savez(directory / "weights.npz", **{n: p.detach().numpy() for n, p in llama.named_parameters()})
    return Task(
        shape,
        composed.data.sequence_length,
        composed.data.micro_batch,
        composed.batch.size,
        steps,
        optim.lr,
        optim.betas,
        optim.eps,
        optim.weight_decay,
        optim.clip,
        str(directory / "tokens.npy"),
        str(directory / "weights.npz"),
        WORK,
        "single",
        str(directory),
    )


def environment_at(directory: Path) -> Path:
    """The Python of the benchmark's own environment, which is made if it is not there."""
    python, done = directory / "bin" / "python", directory / ".peers"
    wanted = [*INSTALLED, f"--editable={ROOT}"]
    if done.is_file() and done.read_text() == "\n".join(wanted):
        return python
    print(f"installing the peers into {directory}", file=sys.stderr)
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line.split("==")[0] not in NOT_PINNED
    ]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pins))
        constraints.flush()
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *wanted]
        subprocess.run(command, check=True, timeout=3600)
    done.write_text("\n".join(wanted))
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions of the peers and of what they run on."""
    names = ("torch", "ai2-olmo-core", "transformers", "accelerate", "lightning-fabric")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    versions: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], timeout=60))
    return versions


# --- one run of one trainer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What was seen of a trainer from outside, from one start on."""

    losses: tuple[float, ...]  # of its first steps
    turns_s: tuple[float, ...]  # the median step of each turn
    first_step_s: float  # from the start of the command to the end of the first step
    memory_mib: float  # peak of the largest process


class Failed(RuntimeError):
    """A trainer did not do its steps."""


class Trainer:
    """A trainer that is stopped unless it is its turn. As a context it is ended on leaving.

    What it is asked for raises Failed, with the end of what it printed.
    """

    def __init__(self, name: str, python: Path, task: Task) -> None:
        self.name, self.python, self.task = name, python, task
        self.directory = Path(task.directory)
        self.turns_s: list[float] = []
        self.first_step_s = 0.0

    def __enter__(self) -> Trainer:
        ranks = LAYOUTS[self.task.layout]
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        variables = {
            "PYTHONPATH": str(ROOT),
            "CRESCENDO_HOME": self.task.directory,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        path = self.directory / "task.json"
        self.task.write(path)
        command = [str(self.python), "-m"]
        if ranks > 1 and self.name != OURS:  # which starts its ranks itself
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        command += [f"benchmarks.peer_trainers.{self.name}", str(path)]
        self._began = time.time()
        with (self.directory / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.task.directory,
                env=os.environ | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the ranks first, so that whatever launched them reaps them."""
        *descendants, _root = family(self._process.pid)
        for pid in descendants:
            _send(pid, signal.SIGKILL)
        _send(self._process.pid, signal.SIGCONT)
        try:
            self._process.wait(20 if descendants else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def warm_up(self) -> None:
        """Its first steps, for which it was started just now."""
        self.first_step_s = self._until(WARM_UP)[0][1] - self._began
        self._signal(signal.SIGSTOP)

    def turn(self) -> None:
        done = len(steps_in(self.directory))
        self._signal(signal.SIGCONT)
        times = [wall for _, wall in self._until(done + 1 + TIMED)[-TIMED - 1 :]]
        self._signal(signal.SIGSTOP)
        self.turns_s.append(statistics.median(after - before for before, after in itertools.pairwise(times)))

    def seen(self) -> Run:
        """What the turns until now told."""
        losses = tuple(loss for loss, _ in steps_in(self.directory)[:COMPARED])
        return Run(losses, tuple(self.turns_s), self.first_step_s, largest_mib(family(self._process.pid)))

    def _until(self, wanted: int) -> list[tuple[float, float]]:
        """Its steps, once there are so many."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(steps := steps_in(self.directory)) < wanted:
            if self._process.poll() is not None:
                raise self._failed(
                    f"ended with exit code {self._process.returncode} before its step {wanted}"
                )
            if time.monotonic() > deadline:
                raise self._failed(f"took more than {TIMEOUT_S:.0f} s, for {len(steps)} of {wanted} steps")
            time.sleep(0.05)
        return steps[:wanted]

    def _failed(self, what: str) -> Failed:
        lines = (self.directory / "output.txt").read_text(errors="replace").splitlines()
        return Failed("\n".join([f"{self.name}, {self.task.layout}: {what}", *lines[-25:]]))

    def _signal(self, number: signal.Signals) -> None:
        for pid in family(self._process.pid):
            _send(pid, number)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def steps_in(directory: Path) -> list[tuple[float, float]]:
    """(loss, time) of each step that all ranks have left a row of; the loss is the mean over those rows."""
    files = [*directory.glob("metrics*.jsonl"), *directory.glob("runs/*/metrics.jsonl")]
    by_rank = [[row for row in _rows(file) if "train/loss" in row] for file in files]
    return [
        (statistics.fmean(row["train/loss"] for row in rows), max(row["wall"] for row in rows))
        for rows in zip(*by_rank, strict=False)
    ]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            yield json.loads(line)


def family(root: int) -> list[int]:
    """This process and all that descend from it, children before their parents."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[::-1]


def largest_mib(pids: Iterable[int]) -> float:
    """Peak memory of the process that had most of it."""
    found = [0.0]
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(peak_mib(pid))
    return max(found)


# --- the comparison ---------------------------------------------------------------------------------------

Runs = dict[str, list[Run]]  # of each trainer, one for each start, in one layout


def unequal(ours: Run, peer: Run) -> str | None:
    """Why the peer did not do the same work, where its losses tell."""
    for step, (a, b) in enumerate(zip(ours.losses, peer.losses, strict=True), start=1):
        if not abs(a - b) <= LOSS_TOLERANCE * abs(a):
            return f"loss {b:.6f} at step {step}, ours {a:.6f}: not the same work"
    return None


def compare(runs: Runs) -> dict[str, dict[str, Any]]:
    """By peer: {"refused": why}, or ours over it in tokens per second (median and quartiles over turns), in
    memory and in start-up."""
    return {name: _against(runs[OURS], theirs) for name, theirs in runs.items() if name != OURS}


def _against(ours: Sequence[Run], peer: Sequence[Run]) -> dict[str, Any]:
    pairs = list(zip(ours, peer, strict=True))
    if reasons := [reason for a, b in pairs if (reason := unequal(a, b))]:
        return {"refused": reasons[0]}
    return {
        "faster": _spread(
            their_s / our_s for a, b in pairs for our_s, their_s in zip(a.turns_s, b.turns_s, strict=True)
        ),
        "memory": statistics.median(a.memory_mib / b.memory_mib for a, b in pairs),
        "start": statistics.median(a.first_step_s / b.first_step_s for a, b in pairs),
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    found = sorted(values)
    q1, median, q3 = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return {"median": median, "q1": q1, "q3": q3}


def met(figures: dict[str, dict[str, Any]]) -> bool:
    """Whether the fastest peer is beaten in tokens per second, and takes no less memory."""
    if not figures or any("refused" in figure for figure in figures.values()):
        return False
    fastest = min(figures.values(), key=lambda figure: figure["faster"]["median"])
    return fastest["faster"]["median"] >= TARGET and fastest["memory"] <= 1


def show(layout: str, runs: Runs, figures: dict[str, dict[str, Any]], tokens: int) -> None:
    verdict = f"target ≥ {TARGET}× the fastest peer, no more memory: {'met' if met(figures) else 'MISSED'}"
    print(f"{layout}, {LAYOUTS[layout]} process(es); {verdict}")
    print(f"  {'':14} tokens/s  ours is faster by     peak MiB   ours    first step s   ours")
    for name, several in runs.items():
        rate = statistics.median(tokens / seconds for one in several for seconds in one.turns_s)
        memory = statistics.median(one.memory_mib for one in several)
        start = statistics.median(one.first_step_s for one in several)
        figure = figures.get(name, {})
        ratios = ["", "", ""]
        if "refused" in figure:
            print(f"  {name:14} no ratio: {figure['refused']}")
            continue
        if figure:
            faster = figure["faster"]
            ratios = [
                f"{faster['median']:.3f} [{faster['q1']:.3f}, {faster['q3']:.3f}]",
                f"{figure['memory']:.2f}×",
                f"{figure['start']:.2f}×",
            ]
        print(
            f"  {name:14} {rate:8,.0f}  {ratios[0]:20}  {memory:8.0f}  {ratios[1]:6}"
            f"  {start:11.1f}   {ratios[2]}"
        )


def measure(
    python: Path, task: Task, names: Sequence[str], layouts: Sequence[str], starts: int, turns: int
) -> dict[str, Runs]:
    """By layout. Raises Failed."""
    found: dict[str, Runs] = {
        layout: {name: [] for name in names if (layout, name) not in LACKING} for layout in layouts
    }
    order = random.Random(0)
    for start, (layout, runs) in itertools.product(range(starts), found.items()):
        with tempfile.TemporaryDirectory(dir=task.directory) as directory, contextlib.ExitStack() as running:
            trainers = []
            for name in order.sample(list(runs), len(runs)):
                own = Path(directory) / name
                own.mkdir()
                (own / "corpora").symlink_to(Path(task.directory) / "corpora")
                trainer = Trainer(name, python, replace(task, layout=layout, directory=str(own)))
                running.enter_context(trainer).warm_up()
                trainers.append(trainer)
            for turn in range(turns):
                for trainer in order.sample(trainers, len(trainers)):
                    trainer.turn()
                    where = f"{layout}, start {start + 1}, turn {turn + 1}"
                    print(f"{where}: {trainer.name}, {trainer.turns_s[-1]:.3f} s a step", file=sys.stderr)
            for trainer in trainers:
                runs[trainer.name].append(trainer.seen())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=2, help="of each trainer (default 2)")
    parser.add_argument("--turns", type=int, default=4, help="after each start (default 4)")
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=PEERS, metavar="PEER")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path.home() / ".cache" / "crescendo" / "peers",
        help="the virtual environment of the peers, made if it is not there (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = (OURS, *arguments.only)
    try:
        python = environment_at(arguments.environment)
        with tempfile.TemporaryDirectory() as directory:
            steps = WARM_UP + arguments.turns * (1 + TIMED) + 4  # none ends by itself
            task = prepare(Path(directory), steps)
            found = measure(python, task, names, arguments.layouts, arguments.starts, arguments.turns)
    except (Failed, subprocess.CalledProcessError) as failure:
        print(failure, file=sys.stderr)
        return 1
    figures = {layout: compare(runs) for layout, runs in found.items()}
    if arguments.json:
        runs = {
            layout: {name: [asdict(one) for one in several] for name, several in of_layout.items()}
            for layout, of_layout in found.items()
        }
        print_json(figures, work=WORK, peers=installed(python), runs=runs)
    with beside_json(arguments.json):
        for layout, of_layout in found.items():
            show(layout, of_layout, figures[layout], task.batch * task.sequence_length)
    return 0 if all(met(figure) for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
