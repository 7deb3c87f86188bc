"""What is learnt: the samples in their order, the model, and its loss."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import registry, samples
from pipeline.config import ClassifierConfig, Config, ConfigError, LlamaConfig
from pipeline.data import Stream, prepare
from pipeline.data.stream import Source
from pipeline.losses import AUC, Binary, CrossEntropy, Loss
from pipeline.model._interface import Model
from pipeline.model.llama import Llama, loss_sum
from pipeline.parallel._ranks import Ranks
from pipeline.samples._samples import Batch, SampleStream
from pipeline.store import home, report


class Problem(Protocol):
    """What a run learns, as the training loop sees it."""

    train: Source[Any]
    held_out: Source[Any]  # in an order that is the same in all runs
    sums: int  # numbers that an evaluation adds up
    l2: float  # the loss of every sample includes l2/2 ‖w‖²
    samples: int | None  # labelled ones to train on, of all ranks together; None of text

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
        """What an evaluation adds up over targets and ranks: float64 [sums]."""
        ...

    def metrics(self, sums: Tensor, targets: int) -> dict[str, float]:
        """By name, of the sums over so many targets; `val/loss` is one of them."""
        ...


class Language:
    """The next token of text; the loss is cross entropy in nats."""

    sums = 1
    l2 = 0.0
    samples: int | None = None

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
        self.train: Source[Any] = Stream(tokens, data.sequence_length, data.seed)
        self.held_out: Source[Any] = Stream(corpus.validation, data.sequence_length, seed=0)

    def model(self) -> Llama:
        with torch.device("meta"):
            return Llama(self._model)

    def tensors(self, read: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(read).to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_sum(model(inputs), targets)

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(model, inputs, targets).double().view(1)

    def metrics(self, sums: Tensor, targets: int) -> dict[str, float]:
        return {"val/loss": float(sums[0]) / targets}


class Classification:
    """The label of a sample, which counts as a sequence of one token. The loss of a sample includes
    `model.l2`/2 ‖w‖²; that of an evaluation does not."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        assert isinstance(config.model, ClassifierConfig)
        self._model, data = config.model, config.data
        self.l2 = self._model.l2
        split = samples.read(data)
        indices = split.train_indices
        self.samples: int | None = len(indices)
        if data.distribution == "by_rank":
            if len(indices) < ranks.data_ranks:
                raise ConfigError(
                    f"data.distribution=by_rank: {len(indices)} samples to train on, for "
                    f"{ranks.data_ranks} ranks. Use data.distribution=shared"
                )
            indices = np.array_split(indices, ranks.data_ranks)[ranks.data_rank]
        self.train: Source[Any] = SampleStream(split.train, indices, data.seed)
        self.held_out: Source[Any] = SampleStream(split.validation, split.validation_indices, seed=0)
        self._shape, self._classes = split.train.shape, split.train.classes
        if self._model.loss != "cross_entropy" and self._classes != 2:
            raise ConfigError(
                f"model.loss={self._model.loss}: is of two classes, and data={data.source} has "
                f"{self._classes}. Use model.loss=cross_entropy"
            )
        self._loss = self._loss_of(split.train.labels[split.train_indices])
        self.sums = self._loss.sums

    def _loss_of(self, labels: NDArray[np.int64]) -> Loss:
        match self._model.loss:
            case "cross_entropy":
                return CrossEntropy(self._classes)
            case "binary":
                return Binary()
            case "auc":
                return AUC(positives=float(labels.mean()))

    def model(self) -> Model:
        import pipeline.model as models

        build = registry.load(models, self._model.kind).build
        with torch.device("meta"):
            model = build(self._model, self._shape, self._loss.outputs)
            model.gathered_whole = self._model.l2 > 0
            return self._loss.completed(model)

    def tensors(self, read: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        inputs, labels = (torch.from_numpy(array).to(device, non_blocking=True) for array in read)
        return inputs, labels

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss.of(model(inputs), targets).sum()
        if self.l2:
            squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
            loss = loss + len(targets) * self.l2 / 2 * squares
        return loss

    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss.evaluated(model(inputs), targets)

    def metrics(self, sums: Tensor, targets: int) -> dict[str, float]:
        return self._loss.metrics(sums, targets)


def check_samples(config: Config) -> None:
    """Reads the samples and builds the model as a rank would. Raises ConfigError."""
    parallel = config.parallel
    Classification(config, Ranks(0, parallel.world_size, 0, parallel.data_ranks, torch.device("cpu"))).model()


def problem_of(config: Config, ranks: Ranks) -> Problem:
    """Raises ConfigError where the data do not fit the model."""
    text = isinstance(config.model, LlamaConfig)
    return Language(config, ranks) if text else Classification(config, ranks)
