"""Nats that run folders of SmolLM2-135M lose per token on four text domains that no included source has.

    python recipes/unseen.py --texts FOLDER --runs RUN RUN2      # FOLDER: the files of corpora.py
    python recipes/unseen.py --show

16 windows of 512 tokens of Wikipedia, a novel, licences and conversations, in bfloat16, against the model that the runs
started from. A row per run, with the command that made it; the error is the standard error over the four domains.
"""

from pathlib import Path
from statistics import fmean, stdev

import corpora
from harness import add, arguments, rows, table
from torch import no_grad

from regrow import load
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.nets import load as load_named
from regrow.nets.devices import autocasting
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "unseen.jsonl"
DOMAINS = ("wiki", "prose", "legal", "dialogue")


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
        for run in args.runs:
            model, record = load(run), RunFolder.open(run).read_record()
            lost = [round(a - b, 4) for a, b in zip(measure(model), before, strict=True)]
            row = {
                "command": record["command"].split(" --out")[0],
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            row |= {"seconds": round(sum(record["seconds"].values())), "lost": dict(zip(DOMAINS, lost, strict=True))}
            known.append(add(args.out, row | {"mean": round(fmean(lost), 3), "error": round(stdev(lost) / 2, 3)}))
    cells = [
        [
            row["command"],
            f"{row['parameters']:,}",
            row["seconds"],
            *row["lost"].values(),
            f"{row['mean']} ± {row['error']}",
        ]
        for row in known
    ]
    print(*table(["command", "parameters", "seconds", *DOMAINS, "mean"], cells), sep="\n")


if __name__ == "__main__":
    main()
