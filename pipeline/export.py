"""Writes a finished run's model as a directory that transformers loads.

    python -m pipeline.export RUN DIR

RUN is a run's id, a unique beginning of it, or its path. Of a run with optim=swa it is the mean of iterates
that is written. The parameters are renamed and nothing else: the rotary pairs are transformers' own. Exit
codes: 0 written, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, ConfigError, LlamaConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.store import RunDirectory

if TYPE_CHECKING:  # torch is imported when there is something to write
    from torch import Tensor

DESCRIPTION = "Write a finished run's model as a directory that transformers loads."

NAMES = {  # ours -> transformers'
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="a finished run: id, unique beginning of it, or path")
    parser.add_argument("directory", metavar="DIR", type=Path, help="must not exist yet, or be empty")
    request = parser.parse_args(arguments)
    try:
        export(RunDirectory.find(request.run), request.directory)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    path = str(request.directory.resolve())
    name = json.dumps(path)  # in double quotes, for the shell's single ones
    code = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({name}))"
    print(path)
    print(f"Load it: python -c {shlex.quote(code)}")
    return 0


def export(run: RunDirectory, directory: Path) -> None:
    """Writes `directory` whole or not at all. Raises ConfigError when the run or the directory is unfit."""
    config = run.config()
    if not isinstance(config.model, LlamaConfig):
        raise ConfigError(
            f"run {run.id} is of model={config.model.name}, of which transformers has no form; only "
            f"language models are exported. Its weights: pipeline.checkpoint.load_weights(run)"
        )
    _check(run, directory)
    from safetensors.torch import save_file

    from pipeline import checkpoint

    weights = checkpoint.load_average(run) if config.optim.name == "swa" else checkpoint.load_weights(run)
    if weights is None:
        raise ConfigError(
            f"run {run.id} is of optim=swa and ended without a mean of iterates, because none came after it "
            f"went on from the last (optim.average_restart_tokens={config.optim.average_restart_tokens}). "
            f"Its last iterate: pipeline.checkpoint.load_weights(run)"
        )
    tensors = transformers_weights(config, weights)
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        staged = Path(temporary) / target.name
        staged.mkdir()
        save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
        settings = json.dumps(transformers_config(config, dtype), indent=2) + "\n"
        (staged / "config.json").write_text(settings, encoding="utf-8")
        staged.rename(target)


def _check(run: RunDirectory, directory: Path) -> None:
    status = run.status()
    if status is None or status.state != "DONE":
        state = status.state if status else "not started"
        seen = f" at {status.tokens_seen} of {status.budget_tokens} tokens" if status else ""
        raise ConfigError(
            f"run {run.id} is {state}{seen}; only a DONE run is exported. "
            f"Finish it: python -m pipeline.worker {run.path}"
        )
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"{directory}: exists and is not empty; name a directory that does not exist")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: is a file; name a directory that does not exist")


def transformers_weights(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under transformers' names. A tied head is the embedding, stored once."""
    import torch

    from pipeline.model.llama import Llama

    assert isinstance(config.model, LlamaConfig)
    with torch.device("meta"):
        expected = dict(Llama(config.model).named_parameters())
    tensors = {transformers_name(name): weights[name].contiguous() for name in expected}
    for name, parameter in expected.items():
        assert weights[name].shape == parameter.shape, f"{name}: {weights[name].shape} in the checkpoint"
    return tensors


def transformers_name(name: str) -> str:
    """blocks.3.ffn.up.weight -> model.layers.3.mlp.up_proj.weight"""
    module = name.removesuffix(".weight")
    if not module.startswith("blocks."):
        return f"{NAMES[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def transformers_config(config: Config, dtype: str) -> dict[str, Any]:
    """config.json: LlamaConfig's fields, in the spelling that releases 4 and 5 both read."""
    model = config.model
    assert isinstance(model, LlamaConfig)
    end = ByteTokenizer.end_of_document if config.data.tokenizer == "bytes" else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
    }


if __name__ == "__main__":
    sys.exit(main())
