"""Nats that run folders of SmolLM2-135M lose per token on four text domains that no included source has.

    python recipes/unseen.py --texts FOLDER --runs RUN RUN2      # FOLDER: the files of corpora.py
    python recipes/unseen.py --show

16 windows of 512 tokens of Wikipedia, a novel, licences and conversations, in bfloat16, against the model that the runs
started from; and the divergence from that model's predictions, in nats per token, on its own greedy replies to 30
questions. A row per run, with the command that made it; errors are standard errors over domains and over questions.
"""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import corpora
from harness import add, arguments, rows, table
from torch import Tensor, no_grad, ones_like
from torch.nn.functional import kl_div

from regrow import load
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.evaluation.generation import encode_chat
from regrow.nets import load as load_named
from regrow.nets.devices import autocasting
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "unseen.jsonl"
DOMAINS = ("wiki", "prose", "legal", "dialogue")
QUESTIONS = """\
What is a river?
Why is the sky blue?
Write a sentence about a dog.
What is the capital of France?
Name three fruits.
How do plants make food?
What does a teacher do?
Explain what a computer is.
Why do people sleep?
What is 2 plus 3?
Give me a tip for saving money.
What is the opposite of hot?
Write a short greeting to a friend.
What is snow made of?
Who wrote Romeo and Juliet?
How many days are in a week?
What is a library for?
Describe the sea in one sentence.
Why should I drink water?
What do bees make?
Name a planet in our solar system.
What is the largest ocean?
How can I learn to cook?
What is gravity?
Tell me a fact about cats.
What is bread made of?
Why do leaves fall in autumn?
What is a good hobby?
Translate "good morning" into Spanish.
What is the job of the heart?
"""


def reply(model: Any, tokenizer: Any, question: str) -> tuple[Tensor, int]:
    """Return a question with the greedy reply of a model, at most 48 tokens, and how many tokens come before it."""
    asked = encode_chat(tokenizer, [{"role": "user", "content": question}])
    return model.generate(asked, attention_mask=ones_like(asked), max_new_tokens=48, do_sample=False), asked.shape[1]


def diverge(dense: Any, model: Any, tokens: Tensor, first: int) -> float:
    """Return the Kullback-Leibler divergence of a model from the dense one, in nats per token from ``first`` on."""
    before, after = (net(tokens).logits[0, first - 1 : -1].float().log_softmax(-1) for net in (dense, model))
    return float(kl_div(after, before, reduction="batchmean", log_target=True))


def main() -> None:
    """Measure each run that has no row yet."""
    args = arguments(__doc__, OUT, texts=Path, runs=[str])
    known = rows(args.out)
    if args.runs and not args.show:
        dense = load_named("smollm2-135m")
        texts = corpora.texts(args.texts)
        options = {"n": 16, "seq_len": 512, "seed": 0, "half": Half.EVALUATION}
        sources = [windows(texts[name](), dense.tokenizer, **options) for name in DOMAINS]

        def measure(model: object) -> list[float]:
            with no_grad(), autocasting(model, "bfloat16"):
                return [perplexity(model, source).mean for source in sources]

        before = measure(dense.model)
        with no_grad(), autocasting(dense.model, "bfloat16"):
            replies = [reply(dense.model, dense.tokenizer, question) for question in QUESTIONS.splitlines()]
        for run in args.runs:
            model, record = load(run), RunFolder.open(run).read_record()
            lost = [round(a - b, 4) for a, b in zip(measure(model), before, strict=True)]
            row = {
                "command": record["command"].split(" --out")[0],
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            with no_grad(), autocasting(model, "bfloat16"), autocasting(dense.model, "bfloat16"):
                away = [diverge(dense.model, model, *pair) for pair in replies]
            row["replies"] = [round(fmean(away), 3), round(stdev(away) / len(away) ** 0.5, 3)]
            row |= {"seconds": round(sum(record["seconds"].values())), "lost": dict(zip(DOMAINS, lost, strict=True))}
            known.append(add(args.out, row | {"mean": round(fmean(lost), 3), "error": round(stdev(lost) / 2, 3)}))
    cells = [
        [
            row["command"],
            f"{row['parameters']:,}",
            row["seconds"],
            *row["lost"].values(),
            f"{row['mean']} ± {row['error']}",
            "{} ± {}".format(*row["replies"]) if "replies" in row else "",
        ]
        for row in known
    ]
    print(*table(["command", "parameters", "seconds", *DOMAINS, "mean", "replies"], cells), sep="\n")


if __name__ == "__main__":
    main()
