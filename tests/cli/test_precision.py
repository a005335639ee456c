"""``--precision bfloat16``: forward passes compute in it, on every command that runs a network; weights do not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import regrow as library
from cli.conftest import Run
from regrow.core.errors import InputError

MAIL = "mail=mail.txt"
AMOUNTS = ("--eval-tokens", "64", "--seq-len", "16")
TEXT = "the house and garden of an old man by a river\n"
COMMANDS = {
    "prune": ("--method", "llm_pruner", "--keep", "0.9", "--source", MAIL, "--tokens", "64", *AMOUNTS, "--out", "made"),
    "grow": ("--mlp", "+8", "--on", MAIL, "--steps", "1", "--tokens", "64", *AMOUNTS, "--out", "made"),
    "evaluate": ("--source", MAIL, *AMOUNTS),
    "recover": ("--by", "distil", "--tokens", "128", "--out", "made"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a tiny random Llama whose tokens are words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *TEXT.split()])}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[torch.dtype]]:
    """Collects the formats of what linear layers return."""
    dtypes: set[torch.dtype] = set()
    forward = nn.Linear.forward

    def record(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        output = forward(self, input)
        dtypes.add(output.dtype)
        return output

    monkeypatch.setattr(nn.Linear, "forward", record)
    yield dtypes


@pytest.mark.parametrize("command", COMMANDS)
def test_passes_compute_in_bfloat16(regrow: Run, model: Path, products: set[torch.dtype], command: str) -> None:
    Path("mail.txt").write_text(TEXT * 200)
    if command == "recover":
        assert regrow("prune", str(model), *COMMANDS["prune"][:-1], "pruned")[0] == 0
        assert torch.bfloat16 not in products
        model = Path("pruned")
    code, _, err = regrow(command, str(model), *COMMANDS[command], "--precision", "bfloat16")
    assert code == 0, err
    assert torch.bfloat16 in products
    if "made" in COMMANDS[command]:
        assert {tensor.dtype for tensor in load_file("made/model.safetensors").values()} == {torch.float32}
        run = library.store.run_folder.RunFolder.open("made")
        assert run.read_record()["settings"]["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("prune", "resnet18", "--keep", "0.9", "--dtype", "float16"), "dtype is float16"),
        (("prune", "resnet18", "--target", "ms=5"), "ms is measured in the format of the weights"),
        (("grow", "resnet18", "--channels", "+8", "--out", "made"), "there are none"),
        (("recover", "run", "--by", "refit", "--out", "made"), "recover by lora or distil"),
    ],
)
def test_what_a_precision_cannot_be_for_is_refused(regrow: Run, words: tuple[str, ...], says: str) -> None:
    code, _, err = regrow(*words, "--precision", "bfloat16")
    assert code == 2 and says in err and "Traceback" not in err, err


def test_precision_in_python(products: set[torch.dtype]) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(64, 4), torch.arange(64) % 2)
    whole = library.evaluate(net, data)["data"].loss
    products.clear()
    half = library.evaluate(net, data, precision="bfloat16")["data"].loss
    assert products == {torch.bfloat16} and half != whole and half == pytest.approx(whole, rel=1e-2)
    products.clear()
    library.prune(net, data, method="llm_pruner", keep=0.5, precision="bfloat16")
    library.grow(net, mlp="+2", data=data, steps=1, precision="bfloat16")
    library.finetune(net, data, precision="bfloat16")
    assert torch.bfloat16 in products and {p.dtype for p in net.parameters()} == {torch.float32}
    with pytest.raises(InputError, match="these are float64"):
        library.evaluate(net.double(), data, precision="bfloat16")
