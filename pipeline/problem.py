"""What is learnt: the samples in their order, the model, and its loss."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import registry, samples
from pipeline.config import ClassifierConfig, Config, ConfigError, LlamaConfig
from pipeline.data import Stream, prepare
from pipeline.data.stream import Source
from pipeline.model._interface import Model
from pipeline.model.llama import Llama, loss_sum
from pipeline.parallel._ranks import Ranks
from pipeline.samples._samples import Batch, SampleStream
from pipeline.store import home, report


class Problem(Protocol):
    train: Source[Any]
    held_out: Source[Any]  # in an order that is the same in all runs
    evaluated: tuple[str, ...]  # the metrics of an evaluation

    def model(self) -> Model:
        """On the meta device."""
        ...

    def tensors(self, read: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs [n, …] and targets [n, …] of what a stream read."""
        ...

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised, summed over targets: a scalar."""
        ...

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The `evaluated` metrics, summed over targets: [len(evaluated)]."""
        ...


class Language:
    """The next token of text; the loss is cross entropy in nats."""

    evaluated = ("val/loss",)

    def __init__(self, config: Config, ranks: Ranks) -> None:
        assert isinstance(config.model, LlamaConfig)
        self._model, data = config.model, config.data
        corpus = prepare(data, home() / "corpora", report=report)
        if corpus.vocab_size > self._model.vocab:
            raise ConfigError(
                f"model.vocab={self._model.vocab}: the tokenizer has {corpus.vocab_size} tokens. "
                f"Nearest model.vocab: {-(-corpus.vocab_size // 16) * 16}"
            )
        tokens = corpus.train
        if data.distribution == "by_rank":
            tokens = np.array_split(tokens, ranks.data_ranks)[ranks.data_rank]
        self.train = Stream(tokens, data.sequence_length, data.seed)
        self.held_out = Stream(corpus.validation, data.sequence_length, seed=0)

    def model(self) -> Llama:
        with torch.device("meta"):
            return Llama(self._model)

    def tensors(self, read: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(read).to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_sum(model(inputs), targets)

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(model, inputs, targets).view(1)


class Classification:
    """The label of a sample, which counts as a sequence of one token. The loss of a sample includes
    `model.l2`/2 ‖w‖²; that of an evaluation does not."""

    evaluated = ("val/loss", "val/accuracy")

    def __init__(self, config: Config, ranks: Ranks) -> None:
        assert isinstance(config.model, ClassifierConfig)
        self._model, data = config.model, config.data
        split = samples.read(data)
        indices = split.train_indices
        if data.distribution == "by_rank":
            if len(indices) < ranks.data_ranks:
                raise ConfigError(
                    f"data.distribution=by_rank: {len(indices)} samples to train on, for "
                    f"{ranks.data_ranks} ranks. Use data.distribution=shared"
                )
            indices = np.array_split(indices, ranks.data_ranks)[ranks.data_rank]
        self.train = SampleStream(split.train, indices, data.seed)
        self.held_out = SampleStream(split.validation, split.validation_indices, seed=0)
        self._shape, self._classes = split.train.shape, split.train.classes
        if self._model.loss != "cross_entropy" and self._classes != 2:
            raise ConfigError(
                f"model.loss={self._model.loss}: is of two classes, and data={data.source} has "
                f"{self._classes}. Use model.loss=cross_entropy"
            )

    def model(self) -> Model:
        import pipeline.model as models

        outputs = self._classes if self._model.loss == "cross_entropy" else 1
        build = registry.load(models, self._model.kind).build
        with torch.device("meta"):
            model = build(self._model, self._shape, outputs)
        model.gathered_whole = self._model.l2 > 0
        return cast(Model, model)

    def tensors(self, read: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        inputs, labels = (torch.from_numpy(array).to(device, non_blocking=True) for array in read)
        return inputs, labels

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._data_loss(model(inputs), targets)
        if self._model.l2:
            squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
            loss = loss + len(targets) * self._model.l2 / 2 * squares
        return loss

    def _data_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._model.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, reduction="sum")
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits.dtype), reduction="sum")

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        guessed = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
        return torch.stack([self._data_loss(logits, targets).double(), (guessed == targets).sum().double()])


def check_samples(config: Config) -> None:
    """Reads the samples and builds the model as a rank would. Raises ConfigError."""
    parallel = config.parallel
    Classification(config, Ranks(0, parallel.world_size, 0, parallel.data_ranks, torch.device("cpu"))).model()


def problem_of(config: Config, ranks: Ranks) -> Problem:
    """Raises ConfigError where the data do not fit the model."""
    kind = Language if isinstance(config.model, LlamaConfig) else Classification
    return kind(config, ranks)
