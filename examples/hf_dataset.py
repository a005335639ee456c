"""Prune a language model with texts of a Hugging Face data set."""

from datasets import Dataset

import regrow
from regrow.nets import load

texts = ["The cat sat on the mat and looked at the rain. " * 40, "To be, or not to be, that is the question. " * 40]
data = {"prose": Dataset.from_dict({"text": texts})}
model = load("smollm2-135m")
before = regrow.evaluate(model.model, data, tokenizer=model.tokenizer)["prose"]
net, plan = regrow.prune(model.model, data, tokenizer=model.tokenizer, keep=0.9, only=("mlp",))
print(before, regrow.evaluate(net, data, tokenizer=model.tokenizer)["prose"], sep="\n")
