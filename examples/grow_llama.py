"""Grow the MLPs of a Llama by a quarter without changing its outputs, and train it on text of one's own."""

import regrow
from regrow.nets import load

loaded = load("smollm2-135m")
text = {"manual": ["Axes are sets of positions that several tensors share. " * 60]}
net, plan = regrow.grow(loaded.model, mlp="+25%", example=loaded.example)
before = regrow.evaluate(net, text, tokenizer=loaded.tokenizer)["manual"]
regrow.finetune(net, text, tokenizer=loaded.tokenizer, epochs=1, lr=0.001)
print(before, regrow.evaluate(net, text, tokenizer=loaded.tokenizer)["manual"], sep="\n")
regrow.save(net, "llama-grown")
