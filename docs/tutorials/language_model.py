# %% [markdown]
# # Prune a language model
#
# SmolLM2-135M loses 5 % of its decoder's weights, all of them in MLPs. Then it answers a question and is exported.
# The settings are small, so that this page is built in seconds. On the command line,
# `regrow prune smollm2-135m --smaller 10% --out RUN` does the same on four kinds of text, in minutes.

# %%
from tempfile import TemporaryDirectory

import regrow
from regrow import data
from regrow.nets import load

loaded = load("smollm2-135m")
model, tokenizer = loaded.model, loaded.tokenizer
texts = {
    "news": data.windows(data.text("news"), tokenizer, n=2, seq_len=64),
    "talk": data.windows(data.text("talk"), tokenizer, n=2, seq_len=64),
}
before = regrow.evaluate(model, texts, tokenizer=tokenizer)

# %% [markdown]
# ## Prune it
#
# `only` names the axes that may be cut; FLAP scores their units by the activations on the texts.
# `plan` says what was removed.

# %%
settings = {"method": "flap", "keep": 0.95, "only": ("mlp",)}
model, plan = regrow.prune(model, texts, tokenizer=tokenizer, **settings)
print(plan)

# %% [markdown]
# ## What it costs
#
# Perplexity rises; `reconstruct=True` and `regrow.recover` win some of it back. Two windows per text are enough to
# show the calls, and too few to measure a model.

# %%
after = regrow.evaluate(model, texts, tokenizer=tokenizer)
print(before["news"], after["news"], sep="\n")

# %% [markdown]
# ## Let it answer

# %%
chat = [{"role": "user", "content": "What is a river?"}]
text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
prompt = tokenizer(text, return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
answer = tokens[prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))

# %% [markdown]
# ## Hand it on
#
# The exported folder loads where regrow is not installed:
# `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
# [Serving](../serving.md) has the other formats: GGUF for llama.cpp, ONNX.

# %%
with TemporaryDirectory() as folder:  # name one of your own
    saved, small = f"{folder}/saved", f"{folder}/small"
    regrow.save(model, saved, example=loaded.example)
    exported = regrow.export(saved, small, format="transformers")
    print(f"{exported.bytes / 1e6:.0f} MB", exported.checked)
