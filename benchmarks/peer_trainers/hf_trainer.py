"""Hugging Face's Trainer and its Llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peer_trainers._task import Record, Task, renamed

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.up": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Sequences(Dataset):
    """In their order: rank r of two reads micro-batch r, r + 2, …"""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self._tokens[index].astype(np.int64))
        return {"input_ids": tokens[:-1], "labels": tokens[1:], "shift_labels": tokens[1:]}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Rows(TrainerCallback):
    def __init__(self, record: Record) -> None:
        self._record = record

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            self._record.write(state.global_step, float(logs["loss"]))


def main() -> None:
    task = Task.of_command_line()
    shape, ranks = task.shape, 1 if task.layout == "single" else 2
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=task.sequence_length,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    named = {
        renamed(name, NAMES, "model.layers"): torch.from_numpy(value)
        for name, value in task.parameters().items()
    }
    model.load_state_dict(named)
    arguments = TrainingArguments(
        output_dir=task.directory,
        max_steps=task.steps,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.batch // (task.micro_batch * ranks),
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        weight_decay=task.weight_decay,
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        adam_epsilon=task.eps,
        max_grad_norm=task.clip,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,  # shift_labels, which the loss takes from **kwargs
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        ddp_find_unused_parameters=False,
    )
    # Weight decay on every parameter, as ours; its own default leaves norms out.
    InOrder.get_decay_parameter_names = lambda self, model: [name for name, _ in model.named_parameters()]
    InOrder(
        model=model,
        args=arguments,
        train_dataset=Sequences(task.sequences()),
        callbacks=[Rows(Record(task))],
    ).train()


if __name__ == "__main__":
    main()
