from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import checkpoint, export
from pipeline.batch import schedule_class
from pipeline.config import Config
from pipeline.identity import complete
from pipeline.model.llama import Llama
from pipeline.problem import problem_of
from pipeline.store import RunDirectory
from tests.distributed import ranks_of, train_here
from tests.model.support import SHAPES, TIED, config, random_llama, random_tokens


def done_run(configuration: Config, model: Llama) -> RunDirectory:
    """A run that ended with these weights, as the training loop leaves it."""
    run = RunDirectory.of(configuration)
    run.freeze(configuration)
    state, first = schedule_class(configuration.batch.schedule)(configuration).start()
    progress = checkpoint.Progress(state, first, first.size)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = checkpoint.Checkpointer(run, ranks_of(configuration), model, optimizer, {}, None, {}, 2)
    checkpoints.save(progress, wait=True)
    run.update_status(state="DONE")
    return run


@pytest.fixture
def run(home: Path) -> RunDirectory:
    configuration = config("model=tiny")
    return done_run(configuration, random_llama(configuration))


@pytest.mark.parametrize("overrides", SHAPES)
def test_transformers_loads_the_same_model(home: Path, overrides: list[str]) -> None:
    configuration = config(*overrides)
    ours = random_llama(configuration)
    run = done_run(configuration, ours)
    assert export.main([run.id[:6], str(home / "out")]) == 0

    theirs, report = AutoModelForCausalLM.from_pretrained(home / "out", output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(configuration.model, 2, 50)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-6, rtol=1e-6)
    assert theirs.num_parameters() == configuration.model.parameters
    assert theirs.dtype is torch.float32


def test_a_run_with_averages_gives_its_mean(
    home: Path, small_corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the last iterate; and what is evaluated as val/loss_averaged."""
    short = ["data.sequence_length=32", "budget.tokens=1024", "batch.size=8", "lr.warmup_tokens=0"]
    averages = ["optim=swa", "optim.base=adamw", "optim.average_start=0.25", "track=disabled"]
    composed = config(*small_corpus, *short, *averages)
    run = train_here(complete(composed))
    run.update_status(state="DONE")
    export.export(run, home / "out")
    found = load_file(home / "out" / "model.safetensors")
    mean, last = checkpoint.load_average(run), checkpoint.load_weights(run)
    assert mean and mean.keys() == last.keys()
    for name, weight in mean.items():
        assert found[export.transformers_name(name)].equal(weight)
    assert not mean["embedding.weight"].equal(last["embedding.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(home / "out")
    held_out = problem_of(run.config(), ranks_of(composed)).held_out
    tokens = torch.from_numpy(held_out.read(0, composed.eval.sequences)).long()
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    averaged = next(row["val/loss_averaged"] for row in run.rows() if "val/loss_averaged" in row)
    assert averaged == pytest.approx(loss.item(), rel=1e-5)


def test_a_mean_of_nothing_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = config("model=tiny", "optim=swa", "optim.average_restart_tokens=1k")
    run = done_run(configuration, random_llama(configuration))
    assert "optim=swa and ended without a mean of iterates" in refusal([run.id, str(home / "out")], capsys)


def test_the_printed_command_loads_it(
    run: RunDirectory, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = home / "it's a model"
    assert export.main([str(run.path), str(target)]) == 0
    path, command = capsys.readouterr().out.splitlines()
    assert path == str(target)
    python, flag, code = shlex.split(command.removeprefix("Load it: "))
    assert (python, flag) == ("python", "-c")
    exec(code)
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert oct(target.stat().st_mode & 0o555) == oct(0o555)  # readable like any other directory


def test_byte_models_end_documents_with_token_256(run: RunDirectory, home: Path) -> None:
    export.export(run, home / "out")
    settings = json.loads((home / "out" / "config.json").read_text())
    assert settings["eos_token_id"] == 256
    assert settings["bos_token_id"] is None


def test_an_empty_directory_is_filled(run: RunDirectory, home: Path) -> None:
    (home / "out").mkdir()
    assert export.main([run.id, str(home / "out")]) == 0
    assert (home / "out" / "model.safetensors").exists()


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr when it refuses."""
    assert export.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "FAILED", "PREEMPTED", "CANCELLED"])
def test_an_unfinished_run_is_refused(
    run: RunDirectory, home: Path, state: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run.update_status(state=state, tokens_seen=500)
    message = refusal([run.id, str(home / "out")], capsys)
    assert f"is {state} at 500 of {run.config().budget_tokens} tokens" in message
    assert f"python -m pipeline.worker {run.path}" in message
    assert not (home / "out").exists()


def test_an_unknown_run_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ffff: no such run" in refusal(["ffff", str(home / "out")], capsys)


def test_an_occupied_directory_is_left_alone(
    run: RunDirectory, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "out").mkdir()
    (home / "out" / "thesis.tex").write_text("precious")
    assert "not empty" in refusal([run.id, str(home / "out")], capsys)
    assert "is a file" in refusal([run.id, str(home / "out" / "thesis.tex")], capsys)
    assert (home / "out" / "thesis.tex").read_text() == "precious"


def test_a_missing_argument_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        export.main(["only-a-run"])
    assert exit_.value.code == 2


def test_a_failed_export_leaves_nothing_behind(
    run: RunDirectory, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "transformers_config", disk_full)
    before = sorted(home.iterdir())
    with pytest.raises(OSError, match="No space"):
        export.export(run, home / "out")
    assert sorted(home.iterdir()) == before


def test_a_tied_head_is_stored_once(home: Path) -> None:
    configuration = config(*TIED)
    weights = dict(random_llama(configuration).named_parameters())
    assert "lm_head.weight" not in export.transformers_weights(configuration, weights)
