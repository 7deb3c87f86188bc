"""The Llama decoder (Touvron et al. 2023, arXiv 2302.13971) with grouped-query attention (Ainslie et al.
2023, arXiv 2305.13245).

A name's suffix is its shape:
    B sequences   T tokens of a sequence   V vocabulary   D model width   F feed-forward width
    H query heads (this rank's)   G key and value heads (this rank's)   K head width   P = K/2 rotary pairs

Head counts are read off the tensors, never from the config, so a tensor-parallel rank that holds some of the
heads runs the same code. Rotary tables are neither parameters nor buffers: a model built on the meta device
needs nothing but its parameters set.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import LlamaConfig, ParallelConfig
from pipeline.gradients.dtensor import whole
from pipeline.model._interface import Model
from pipeline.model._rms_norm import RMSNorm

STANDARD_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("attention.out.weight", "ffn.down.weight")  # what is added to the residual stream


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table first made during evaluation must serve training too
def rotary_tables(tokens: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin) of the angles m·θ^(-2p/K) of position m and pair p, each [T, 1, K] float32.

    Su et al. 2021 (arXiv 2104.09864), eq. 15 and 34.
    """
    frequency_P = 1.0 / theta ** (torch.arange(0, head_width, 2, device=device).float() / head_width)
    angle_T1P = torch.arange(tokens, device=device).float().view(-1, 1, 1) * frequency_P
    cos_T1P, sin_T1P = angle_T1P.cos(), angle_T1P.sin()
    return torch.cat((cos_T1P, cos_T1P), dim=-1), torch.cat((-sin_T1P, sin_T1P), dim=-1)


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Turns every pair (x[p], x[p + K/2]) by its position's angle; pairs as in GPT-NeoX and transformers.

    Rolling by K/2 swaps the halves; the tables carry the signs. On a CPU a third faster than joining halves.
    """
    return (x_BTHK * cos_T1K + x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1) * sin_T1K).type_as(x_BTHK)


class Attention(nn.Module):
    """Causal self-attention; H/G neighbouring query heads share one key and value head."""

    def __init__(self, model: LlamaConfig) -> None:
        super().__init__()
        self.head_width = model.head_width
        self.query = nn.Linear(model.width, model.heads * model.head_width, bias=False)
        self.key = nn.Linear(model.width, model.kv_heads * model.head_width, bias=False)
        self.value = nn.Linear(model.width, model.kv_heads * model.head_width, bias=False)
        self.out = nn.Linear(model.heads * model.head_width, model.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK = rotate(self.query(x_BTD).view(B, T, -1, self.head_width), cos_T1K, sin_T1K)
        k_BTGK = rotate(self.key(x_BTD).view(B, T, -1, self.head_width), cos_T1K, sin_T1K)
        v_BTGK = self.value(x_BTD).view(B, T, -1, self.head_width)
        q_BHTK, k_BGTK, v_BGTK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: Shazeer 2020 (arXiv 2002.05202), eq. 6."""

    def __init__(self, model: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(model.width, model.ffn, bias=False)
        self.up = nn.Linear(model.width, model.ffn, bias=False)
        self.down = nn.Linear(model.ffn, model.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """One layer: pre-normalised attention and feed-forward, each added to the residual stream."""

    def __init__(self, model: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.width, eps=model.norm_eps)
        self.attention = Attention(model)
        self.ffn_norm = RMSNorm(model.width, eps=model.norm_eps)
        self.ffn = FeedForward(model)
        self.recompute = False

    def forward(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            inputs = (x_BTD, cos_T1K, sin_T1K)
            return checkpoint(self.layers, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.layers(x_BTD, cos_T1K, sin_T1K)

    def layers(self, x_BTD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_T1K, sin_T1K)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        # On the meta device it would change nothing, and import torch's compiler (1 s) to do so.
        if not self.weight.is_meta:
            super().reset_parameters()


class Llama(Model):
    """tokens [B, T] int64 -> logits [B, T, V]."""

    def __init__(self, model: LlamaConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = Embedding(model.vocab, model.width)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = RMSNorm(model.width, eps=model.norm_eps)
        self.head = nn.Linear(model.width, model.vocab, bias=False)
        self.tie()

    def tie(self) -> None:
        if self.model.tied:
            self.head.weight = self.embedding.weight

    @property
    def layers(self) -> list[nn.Module]:
        # A tied head shares the embedding's weight, so both belong to the root, which holds its parameters
        # through forward and backward pass.
        return [*self.blocks] if self.model.tied else [self.embedding, *self.blocks, self.head]

    def prepare(self, parallel: ParallelConfig) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = parallel.activation_checkpointing
            if parallel.compile:
                block.compile()

    def initial_weight(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Matrices are normal(0, 0.02), as in GPT (Radford et al. 2018, section 4.1). Those whose output is
        added to the residual stream are scaled by 1/sqrt(N), N = 2·layers additions (GPT-2: Radford et al.
        2019, section 2.3), so that the stream's variance does not grow with depth. Norms are 1."""
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        assert len(shape) == 2, f"{name}: no rule for the initial values of shape {tuple(shape)}"
        scale = 1 / math.sqrt(2 * self.model.layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
        return torch.empty(shape).normal_(0.0, STANDARD_DEVIATION * scale, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        cos_T1K, sin_T1K = rotary_tables(
            tokens_BT.shape[1], self.model.head_width, self.model.rope_theta, tokens_BT.device
        )
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_T1K, sin_T1K)
        return self.head(self.norm(x_BTD))


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross entropy [nats] summed over tokens, in float32; the caller divides by the whole step's tokens."""
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
    return whole(loss)  # of logits split by vocabulary
