"""Checkpoints: everything that decides how a run goes on.

    checkpoints/step-00000120/   torch.distributed.checkpoint: model and optimizer, by parameter name; of
                                 replicas their mean as the model, and what each has under its own name
                progress.json    where the run stands: clock, stream position, batch schedule; of what model
                partial-…        being written, or left by a process that died; removed at the next start
                torn-…           found damaged and passed over; nothing reads it again, and it is removed
                                 when the run that went on without it has saved its first checkpoint

A checkpoint is written beside the training, under a temporary name, and renamed when complete. The newest
two are kept. Before one is loaded all its bytes, progress.json included, are compared with their checksums.
Damaged is what is missing, too short or not what was written; a disk that does not answer ends the attempt,
and nothing is changed. Ranks in any number and under any strategy read what others wrote.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.batch._interface import Decision, State
from pipeline.config import ConfigError
from pipeline.optim._batch_scaling import Noise
from pipeline.parallel._ranks import Ranks
from pipeline.store import MetricsWriter, RunDirectory, report, sync_directory, write_atomically
from pipeline.sync._interface import Method

# torch.distributed.checkpoint is imported by what saves and loads: it takes a second, which the first step of
# a new run need not wait for.
if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

CHECKPOINT_SCHEMA = 3  # raise it when what a checkpoint holds begins to mean something else
SAVE_TIMEOUT = timedelta(minutes=30)
_TAIL_BYTES = 4096
LAST_MOMENT_S = 20.0  # for the outstanding checkpoint of a run that ends with an error

# A single process without a process group is what we mean. Not within a block: a thread does the writing.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A run cannot be saved or resumed. One line, which says how to go on."""


class _Damaged(Exception):
    """A file is not what was written. Says which and how."""


@dataclass
class Progress:
    """Where a run stands between two optimizer steps."""

    schedule: State
    next_batch: Decision
    first_batch: int  # sequences; the batch that lr.batch_scaling is relative to
    step: int = 0
    sequences: int = 0
    time: float = 0.0  # seconds of training, summed over attempts
    noise: Noise = field(default_factory=Noise)  # of the gradient, as lr.batch_scaling has seen it
    gradient_evaluations: int = 0  # of single sequences, also those that an optimizer asked for
    loss_evaluations: int = 0  # of single sequences, without a gradient: those of a line search
    averaged: int = 0  # iterates in the mean that optim=swa keeps
    unchanged: int = 0  # steps in a row, up to the last one, with the batch that comes next

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Progress:
        # Of an earlier version, which saw every sequence once.
        earlier = {"loss_evaluations": 0, "averaged": 0, "unchanged": 0}
        tree = {"gradient_evaluations": tree["sequences"], **earlier, **tree}
        values = {field.name: tree[field.name] for field in dataclasses.fields(Progress)}
        values["schedule"] = State.from_tree(tree["schedule"])
        values["next_batch"] = Decision(**tree["next_batch"])
        values["noise"] = Noise(**tree["noise"])
        return Progress(**values)


@dataclass(frozen=True)
class _Outstanding:
    """A checkpoint that is being written."""

    progress: Progress
    partial: Path
    written: Future[Metadata]


class Checkpointer:
    """The checkpoints of a run in training. Every rank has one and calls its methods at the same steps."""

    def __init__(
        self,
        run: RunDirectory,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        captured: Mapping[str, torch.Tensor],
        record: MetricsWriter | None,
        settings: Mapping[str, Any],
        keep: int,
        sync: Method | None = None,
    ) -> None:
        self._sync = sync  # of ranks that are replicas: each saves its own model, moments and messages
        self._keep = keep  # the newest so many
        self._run, self._ranks, self._model, self._optimizer = run, ranks, model, optimizer
        self._captured = captured  # what the gradient statistics remember, by parameter name
        self._record = record  # rank 0's
        self._settings = dict(settings)  # by dotted name: what must be the same when the run goes on
        # A group of its own: the thread that writes must not meet the collectives of the training.
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if ranks.world_size > 1 else None
        self._outstanding: _Outstanding | None = None

    # --- saving

    def save(self, progress: Progress, wait: bool) -> None:
        """Copies what is to be saved to memory and writes it while training goes on, or, with `wait`, now.

        Only one checkpoint is written at a time. One that cannot be written is a warning, or, with `wait`,
        a CheckpointError on all ranks; the older ones stay in any case. A step that is saved already is not
        saved again.
        """
        self.settle()
        if self._ranks.from_main(self._ranks.is_main and self._place(progress).exists()):
            return
        partial = self._run.checkpoints / f"partial-{progress.step:08d}"
        tensors = self._tensors()
        if self._sync:  # what an export reads
            replica = self._sync.replica
            tensors["model"] = replica.by_name(replica.averaged(replica.weights()))
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        from pipeline._checkpoint_writer import Writer

        copier = DefaultStager(StagingOptions(False, False, False, False))  # it has copied when it returns
        written = dcp.async_save(
            tensors, storage_writer=Writer(partial), async_stager=copier, process_group=self._group
        )
        assert isinstance(written, Future)
        written.add_done_callback(lambda _: copier.close())
        self._outstanding = _Outstanding(dataclasses.replace(progress), partial, written)
        if wait and (failure := self._ranks.from_main(self._finish())):
            newest = self._newest()
            start = f"it goes on from step {newest}" if newest else "it starts from the beginning"
            raise CheckpointError(
                f"the checkpoint at step {progress.step}, the last of this attempt, could not be written: "
                f"{failure}. Mend that (on a full disk: free space), then run it again: {start}"
            )

    def poll(self) -> bool:
        """Puts the outstanding checkpoint in its place if it is written. Whether there was such a one."""
        if self._outstanding is None or not self._outstanding.written.done():
            return False
        self.settle()
        return True

    def settle(self) -> None:
        """Waits for the outstanding checkpoint, if any. Raises CheckpointError when it takes too long."""
        if self._outstanding is None:
            return
        step = self._outstanding.progress.step
        if failure := self._finish():
            newest = self._newest()
            kept = f"the newest checkpoint is step {newest}" if newest else "there is no checkpoint yet"
            report(f"checkpoint at step {step} could not be written: {failure}; the run goes on, {kept}")

    def close(self) -> None:
        """Gives the outstanding checkpoint of a run that ends with an error a moment to become complete."""
        if self._outstanding:
            concurrent.futures.wait([self._outstanding.written], LAST_MOMENT_S)
            self.poll()

    def _finish(self) -> str | None:
        """Waits for the outstanding checkpoint. Rank 0 puts it in its place, or says why it cannot.

        That rank 0 has written means that all have: its part comes last.
        """
        assert self._outstanding
        outstanding, self._outstanding = self._outstanding, None
        try:
            error = outstanding.written.exception(SAVE_TIMEOUT.total_seconds())
        except TimeoutError:
            raise CheckpointError(
                f"the checkpoint at step {outstanding.progress.step} is not written after {SAVE_TIMEOUT}: "
                f"is the disk still there?"
            ) from None
        if not self._ranks.is_main:
            return None
        import torch.distributed.checkpoint as dcp

        try:
            if error is not None:
                raise error
            self._publish(outstanding)
        except (Exception, dcp.CheckpointException) as failure:
            shutil.rmtree(outstanding.partial, ignore_errors=True)  # others need the space
            return _in_one_line(failure)
        return None

    def _publish(self, done: _Outstanding) -> None:
        if self._record:
            # A checkpoint must not overtake the record: no later attempt would do those rows again.
            self._record.sync()
        metadata = (done.partial / ".metadata").read_bytes()
        entries = _entries(done.partial, metadata, torch.__version__)
        progress = {
            "schema": CHECKPOINT_SCHEMA,
            "torch": str(torch.__version__),
            "metadata_crc32": zlib.crc32(metadata),
            "tail_crc32": [_tail_crc32(done.partial, entry) for entry in entries.values()],
            "settings": self._settings,
            **dataclasses.asdict(done.progress),
        }
        progress["crc32"] = _crc32(progress)
        write_atomically(done.partial / "progress.json", json.dumps(progress, indent=1))
        done.partial.rename(self._place(done.progress))
        sync_directory(self._run.checkpoints)
        with contextlib.suppress(OSError):  # what cannot be removed now is removed after the next one
            for torn in self._run.checkpoints.glob("torn-*"):
                shutil.rmtree(torn, ignore_errors=True)
            for old in self._run.complete_checkpoints()[: -self._keep]:
                shutil.rmtree(old.rename(old.with_name(f"partial-{old.name}")), ignore_errors=True)

    def _tensors(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model_state, optimizer_state = get_state_dict(self._model, self._optimizer)
        tensors = {"model": model_state, "optimizer": optimizer_state}
        if self._captured:
            tensors["captured"] = dict(self._captured)
        if self._sync is None:
            return tensors
        if state := dict(self._sync.state()):
            tensors["sync"] = state
        return {self._own: tensors}

    @property
    def _own(self) -> str:
        return f"replica-{self._ranks.rank}"

    def _place(self, progress: Progress) -> Path:
        return self._run.checkpoints / f"step-{progress.step:08d}"

    def _newest(self) -> int | None:
        paths = self._run.complete_checkpoints()
        return _step(paths[-1]) if paths else None

    # --- resuming

    def restore(self) -> Progress | None:
        """Loads the newest whole checkpoint into model and optimizer; None when there is no checkpoint.

        Raises ConfigError for one of another model, schema or torch, CheckpointError when all are damaged or
        one cannot be read.
        """
        if self._ranks.is_main:
            for left in self._run.checkpoints.glob("partial-*"):
                shutil.rmtree(left, ignore_errors=True)
        torn: dict[Path, str] = {}
        complete = self._together(lambda _: self._run.complete_checkpoints(), self._run.checkpoints)[0]
        for path in reversed(complete):
            if found := self._first_found(self._look, path) or self._first_found(self._load, path):
                torn[path] = found
                continue
            progress = Progress.from_tree(self._together(read_progress, path)[0])
            if self._ranks.is_main:
                _set_aside(torn)
            return progress
        if torn:
            reasons = "; ".join(f"step {_step(path)}: {found}" for path, found in torn.items())
            raise CheckpointError(
                f"{self._run.checkpoints}: no checkpoint can be loaded ({reasons}). Bring back what is "
                f"missing, or delete this directory to start from the beginning"
            )
        return None

    def branch(self, tokens: int, parent: RunDirectory) -> Progress:
        """Loads the checkpoint of another run after so many tokens; its schedule and statistics stay there.

        Raises ConfigError when there is none or it is another model's.
        """
        kept = self._together(lambda _: by_tokens(parent), parent.checkpoints)[0]
        path = kept.get(tokens)
        if path is None:
            raise ConfigError(
                f"branch.tokens={tokens}: run {parent.id} has no checkpoint there; it has "
                f"{', '.join(map(str, sorted(kept))) or 'none'}. checkpoint.keep says how many stay"
            )
        if found := self._first_found(self._look, path) or self._first_found(self._load_parent, path):
            raise ConfigError(f"{path}: is damaged: {found}")
        return Progress.from_tree(self._together(read_progress, path)[0])

    def _load_parent(self, path: Path) -> str | None:
        own = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        found = self._load(path, captured=False)
        for group, settings in zip(self._optimizer.param_groups, own, strict=True):
            group.update(settings)  # the branch's weight decay, not its parent's
        return found

    def _look(self, path: Path) -> str | None:
        """The damage in this rank's share of a checkpoint. Raises ConfigError for another model's."""
        found = damage(path, self._ranks.rank, self._ranks.world_size)
        if found is None:
            _check_same_settings(path, self._settings)
        return found

    def _load(self, path: Path, captured: bool = True) -> str | None:
        """What is wrong with a checkpoint that cannot be loaded."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        from pipeline.plain_reader import Planner, Reader

        tensors = self._tensors()
        if not captured:
            tensors.pop("captured", None)
        try:
            reader = Reader(path)
            dcp.load(tensors, storage_reader=reader, planner=Planner(), process_group=self._group)
        except dcp.CheckpointException as error:
            for rank, (cause, _) in error.failures.items():
                # All checksums were right: it is not the checkpoint that is to blame, and it must stay.
                if not isinstance(cause, FileNotFoundError):
                    raise CheckpointError(_unreadable(path, cause, rank)) from None
            return _in_one_line(error)
        if self._sync:
            tensors = tensors[self._own]
            self._sync.load_state(tensors.get("sync", {}))
        model_state, optimizer_state = tensors["model"], tensors["optimizer"]
        set_state_dict(
            self._model, self._optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        return None

    def _first_found(self, look: Callable[[Path], str | None], path: Path) -> str | None:
        """On all ranks: what the first rank with something to say found."""
        return next(filter(None, self._together(look, path)), None)

    def _together(self, look: Callable[[Path], T], path: Path) -> list[T]:
        """On all ranks: what each saw at `path`, by rank. An error on one is raised on all, lest they wait
        for each other."""
        mine: T | ConfigError | CheckpointError
        try:
            mine = look(path)
        except OSError as error:
            mine = CheckpointError(_unreadable(path, error, self._ranks.rank))
        except (ConfigError, CheckpointError) as error:
            mine = error
        seen: list[Any] = [mine]
        if self._group is not None:
            seen = [None] * self._ranks.world_size
            dist.all_gather_object(seen, mine, group=self._group)
        for found in seen:
            if isinstance(found, Exception):
                raise found
        return seen


def by_tokens(run: RunDirectory) -> dict[int, Path]:
    """The readable checkpoints of a run by the tokens seen there."""
    length, found = run.config().data.sequence_length, {}
    for path in run.complete_checkpoints():
        with contextlib.suppress(_Damaged, FileNotFoundError):  # the latter: its run has pruned it meanwhile
            found[read_progress(path)["sequences"] * length] = path
    return found


def damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What has become of a checkpoint since it was complete; None: it is whole.

    The checksums compared are those of every `shares`-th tensor. Raises ConfigError for another schema or a
    torch that cannot read it, OSError when a file is there but cannot be read.
    """
    try:
        progress = read_progress(path)
        data = (path / ".metadata").read_bytes()
        if zlib.crc32(data) != progress["metadata_crc32"]:
            return ".metadata is not what was written"
        entries = _entries(path, data, progress["torch"])
        ends: dict[str, int] = {}
        for entry in entries.values():
            ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
        for name, end in ends.items():
            if (size := (path / name).stat().st_size) < end:
                return f"{name} has {size} of {end} bytes"
        tails = progress.get("tail_crc32")  # not in what earlier versions wrote
        for number, (index, entry) in list(enumerate(entries.items()))[share::shares]:
            changed = tails is not None and tails[number : number + 1] != [_tail_crc32(path, entry)]
            if changed or _is_corrupt(path / entry.relative_path, entry.offset, entry.length):
                return f"{index.fqn} in {entry.relative_path} is not what was written"
    except _Damaged as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    return None


def load_weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The newest whole checkpoint's parameters by name, without a model or other ranks."""
    return _load_tensors(_newest_whole(run), "model.")


def load_average(run: RunDirectory) -> dict[str, torch.Tensor] | None:
    """The same of the mean of iterates beside them, of optim=swa; None where that has none yet."""
    path = _newest_whole(run)
    return _load_tensors(path, "captured.average.") if read_progress(path).get("averaged") else None


def _newest_whole(run: RunDirectory) -> Path:
    for path in reversed(run.complete_checkpoints()):
        try:
            if found := damage(path):
                report(f"checkpoint at step {_step(path)} is damaged: {found}; an older one is read")
                continue
        except OSError as error:
            raise ConfigError(_unreadable(path, error)) from error
        return path
    raise ConfigError(f"{run.checkpoints}: holds no whole checkpoint, so there are no weights to read")


def read_progress(path: Path) -> dict[str, Any]:
    """Raises _Damaged, and ConfigError for another schema."""
    try:
        tree: dict[str, Any] = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        written = tree.pop("crc32", None)
    except (ValueError, TypeError, AttributeError) as error:
        raise _Damaged(f"progress.json is unreadable ({_in_one_line(error)})") from error
    whole = written == _crc32(tree)
    schema = tree.get("schema", 0)
    if schema != CHECKPOINT_SCHEMA and (whole or written is None):  # the first schema had no checksum
        raise ConfigError(
            f"{path}: its schema is {schema}, this version reads {CHECKPOINT_SCHEMA}. Go on with the version "
            f"that wrote it, or delete {path.parent} to start from the beginning"
        )
    if not whole:
        raise _Damaged("progress.json is not what was written")
    return tree


def _crc32(tree: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def _entries(path: Path, metadata: bytes, version: str) -> dict[Any, Any]:
    """Where each tensor lies. `metadata` is what torch, of that version, wrote."""
    from pipeline.plain_reader import index_of

    try:
        entries: dict[Any, Any] = index_of(metadata).storage_data
        return entries
    except Exception as error:  # its checksum was right: the bytes are not to blame, whatever this raises
        raise ConfigError(
            f"{path}: torch {torch.__version__} cannot read what torch {version} wrote "
            f"({_in_one_line(error)}). Go on with that version, or delete {path.parent} to start from the "
            f"beginning"
        ) from error


def _tail_crc32(path: Path, entry: Any) -> int:
    """Of the end of a tensor's archive, where zip keeps the checksums of what is in it: cheap to read, and it
    tells a file of this checkpoint from the same file of another."""
    length = min(entry.length, _TAIL_BYTES)
    with open(path / entry.relative_path, "rb") as file:
        file.seek(entry.offset + entry.length - length)
        return zlib.crc32(file.read(length))


def _is_corrupt(path: Path, offset: int, length: int) -> bool:
    """torch writes each tensor as a zip archive, with checksums that it does not compare when it reads."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    try:
        return zipfile.ZipFile(io.BytesIO(data)).testzip() is not None
    except Exception:  # wrong bytes where the archive describes itself raise nearly anything
        return True


def _load_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names in the checkpoint begin so, by the rest of their names."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from pipeline.plain_reader import Planner, Reader

    metadata = Reader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=Reader(path), planner=Planner(), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _check_same_settings(path: Path, here: dict[str, Any]) -> None:
    there = read_progress(path)["settings"]
    differences = [
        f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
        for key in sorted(here.keys() | there.keys())
        if (key in here, here.get(key)) != (key in there, there.get(key))
    ]
    if differences:
        raise ConfigError(
            f"{path}: is of another model: {', '.join(differences)}. Go on with the model it was saved from, "
            f"or delete {path.parent} to start from the beginning"
        )


def _set_aside(torn: dict[Path, str]) -> None:
    """Out of the way of what is saved at the same step, and out of the count of those that are kept."""
    for path, found in torn.items():
        aside = path.with_name(path.name.replace("step-", "torn-"))
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        report(f"checkpoint at step {_step(path)} is damaged: {found}; passed over, now {aside.name}")


def _unreadable(path: Path, error: BaseException, rank: int | None = None) -> str:
    by = "" if rank is None else f" by rank {rank}"
    return (
        f"{getattr(error, 'filename', None) or path}: cannot be read{by} ({_in_one_line(error)}): "
        f"nothing was changed; mend that, then run it again"
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _in_one_line(error: BaseException) -> str:
    import torch.distributed.checkpoint as dcp

    if isinstance(error, dcp.CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_in_one_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]
