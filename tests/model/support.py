"""Models for tests: weights large enough that attention is far from uniform, and transformers' own Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Config, ModelConfig
from pipeline.export import transformers_weights
from pipeline.model.llama import Llama
from tests.support import config

TIED = ["model=tiny", "model.tied=true"]
ONE_KV_HEAD = ["model=tiny", "model.layers=3", "model.width=96", "model.heads=6", "model.kv_heads=1"]
NO_GROUPS = ["model=tiny", "model.kv_heads=4", "model.ffn=40", "model.rope_theta=50.0", "model.norm_eps=0.01"]
SHAPES = [["model=tiny"], TIED, ONE_KV_HEAD, [*NO_GROUPS, "model.tied=true"]]


def random_llama(configuration: Config, seed: int = 0) -> Llama:
    """Activations of order 1 throughout, so that a wrong angle, mask or norm shows in the logits."""
    model = Llama(configuration.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    return model


def random_tokens(model: ModelConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(model.vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def reference(configuration: Config, ours: nn.Module) -> LlamaForCausalLM:
    """transformers' Llama of the same shape, with the same weights."""
    model = configuration.model
    settings = LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.width,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied,
    )
    theirs = LlamaForCausalLM(settings).eval()
    weights = transformers_weights(configuration, dict(ours.named_parameters()))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if model.tied else [])
    return theirs


__all__ = ["SHAPES", "TIED", "config", "random_llama", "random_tokens", "reference"]
