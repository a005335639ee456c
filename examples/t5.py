"""Prune an encoder-decoder model: the decoder's inputs are made of the labels, as in training."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

import regrow

config = T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
model = T5ForConditionalGeneration(config).eval()
batches = [{"input_ids": torch.randint(2, 500, (4, 12)), "labels": torch.randint(2, 500, (4, 8))} for _ in range(4)]
model, plan = regrow.prune(model, batches, smaller="20%")
print(plan, regrow.evaluate(model, batches), sep="\n")
regrow.save(model, "t5-small")
print(regrow.load("t5-small").generate(batches[0]["input_ids"], max_new_tokens=5))
