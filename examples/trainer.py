"""Prune in three steps, with a transformers Trainer between the steps."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import regrow

config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(500, (32, 16))]
size = sum(p.numel() for p in model.parameters())
for share in (0.9, 0.8, 0.7):
    model, plan = regrow.prune(model, rows, target=f"params={int(size * share)}", batch_size=8)
    options = TrainingArguments("checkpoints", max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, options, train_dataset=rows).train()  # a new one: optimizers hold the weights of their network
    print(f"{share:.0%}: {regrow.evaluate(model, rows)}")
