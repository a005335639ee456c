"""What llama.cpp says to prompts: the half of gguf_check.py that runs where llama-cpp-python is, without torch.

    python recipes/gguf_llama_cpp.py JOB.json

The job names files, token numbers and texts; logits are left as .npy files beside it, and answers in ``said.json``.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp as cpp
import numpy as np


class Server:
    """A GGUF file, loaded.

    Args:
        path: The file.
        exact: Keys and values in float32 and plain attention; else whatever llama.cpp does by itself (float16).
        length: Tokens that a text may have.
    """

    def __init__(self, path: str, exact: bool, length: int) -> None:
        self.model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        settings = cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = length, length, 1, 1
        if exact:
            settings.type_k = settings.type_v = 0
            settings.flash_attn_type = 0
        self.context = cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = cpp.llama_model_get_vocab(self.model)
        self.words = cpp.llama_vocab_n_tokens(self.vocabulary)
        self.batch = cpp.llama_batch_init(length, 0, 1)

    def close(self) -> None:
        """Give everything back."""
        cpp.llama_batch_free(self.batch)
        cpp.llama_free(self.context)
        cpp.llama_model_free(self.model)

    def logits(self, ids: list[int], start: int = 0, whole: bool = False) -> np.ndarray:
        """Logits after the last token, (words,), or after each, (tokens, words).

        Args:
            ids: New tokens.
            start: Tokens that were given before.
            whole: Whether those after each are wanted.
        """
        if start == 0:
            cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = whole or i == len(ids) - 1
        if cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp does not run the network")
        rows = [cpp.llama_get_logits_ith(self.context, i) for i in (range(len(ids)) if whole else [len(ids) - 1])]
        found = np.stack([np.ctypeslib.as_array(row, (self.words,)).copy() for row in rows])
        return found if whole else found[0]

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        """The tokens that follow, the likeliest each time."""
        given: list[int] = []
        last = self.logits(ids)
        for step in range(steps):
            given.append(int(last.argmax()))
            last = self.logits(given[-1:], start=len(ids) + step)
        return given

    def tokens(self, text: str) -> list[int]:
        """A text in tokens."""
        data = text.encode()
        room = (cpp.llama_token * (len(data) + 8))()
        n = cpp.llama_tokenize(self.vocabulary, data, len(data), room, len(room), True, True)
        return list(room[:n])


def answer(one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that one entry of a job asks.

    Args:
        one: ``file``, ``name``, ``exact``, ``prompts``, ``whole``, ``greedy`` (prompts, tokens), ``texts``.
        folder: Where logits are left.
    """
    prompts, (greedy, steps) = one["prompts"], one["greedy"]
    server = Server(one["file"], one["exact"], max(len(ids) for ids in prompts) + steps + 1)
    np.save(
        folder / f"{one['name']}.whole.npy", np.stack([server.logits(i, whole=True) for i in prompts[: one["whole"]]])
    )
    np.save(folder / f"{one['name']}.last.npy", np.stack([server.logits(ids) for ids in prompts]))
    said = {
        "greedy": [server.greedy(ids, steps) for ids in prompts[:greedy]],
        "tokens": [server.tokens(text) for text in one["texts"]],
    }
    server.close()
    return said


def main() -> None:
    """Do a job."""
    silence = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(silence, ctypes.c_void_p(0))
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    said = {one["name"]: answer(one, path.parent) for one in job}
    (path.parent / "said.json").write_text(json.dumps({"version": cpp.__version__, "said": said}))


if __name__ == "__main__":
    main()
