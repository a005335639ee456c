"""Prune a BERT classifier with batches as a tokenizer makes them, save it, and load it again."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import regrow

config = BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = BertForSequenceClassification(config).eval()
batch = {"input_ids": torch.randint(500, (8, 16)), "attention_mask": torch.ones(8, 16, dtype=torch.long)}
batches = [batch | {"labels": torch.randint(2, (8,))} for _ in range(4)]
model, plan = regrow.prune(model, batches, smaller="20%")
print(plan, regrow.evaluate(model, batches), sep="\n")
regrow.save(model, "bert-small", example=batch)
print(regrow.load("bert-small")(**batch).logits.shape)
print(regrow.export(model, "bert-small.onnx", format="onnx", example=batch).checked)
