"""Prune a speech recogniser, fine-tune it on its transcripts, and let it transcribe."""

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import regrow

layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
tokens = {"vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
config = WhisperConfig(d_model=64, num_mel_bins=20, max_source_positions=100, **layers, **heads, **tokens)
model = WhisperForConditionalGeneration(config).eval()
sound, words = torch.randn(2, 20, 200), torch.randint(3, 500, (2, 8))
batches = [{"input_features": sound, "labels": words}] * 2
model, plan = regrow.prune(model, batches, smaller="20%")
regrow.finetune(model, batches, epochs=1)
print(plan, regrow.evaluate(model, batches), sep="\n")
print(model.generate(sound, max_new_tokens=5).shape)
