"""ONNX: onnxruntime says what torch says, whatever was cut, widened or dropped, at sizes other than the example's."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laws
from regrow import Plan, apply, export, load, trace, with_branches
from regrow.core.axes import Example
from regrow.exporters import ExportError
from regrow.exporters import onnx as format
from regrow.exporters.onnx import place_file, unused_name, write
from regrow.nets import Origin
from regrow.nets.cells import Cells, supernet_config
from regrow.nets.vision import small
from regrow.store import save
from regrow.store.atomic import stage_folder
from regrow.tracing.branches import PlaceholderModule
from store.saved import CASES, cut
from zoo import ZOO

onnx = pytest.importorskip("onnx", reason="needs regrow[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs regrow[export]")
pytest.importorskip("onnxscript", reason="needs regrow[export]")


def runs(path: Path, **inputs: Tensor) -> list[Tensor]:
    """What a file says, opened anew."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(one) for one in session.run(None, {name: one.numpy() for name, one in inputs.items()})]


def says(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Example]:
    """Every width of its own, and biases that were not there."""
    case = CASES["llama_tied"]
    model, _, _ = cut(case)
    assert any(name.endswith("down_proj.bias") for name, _ in model.named_parameters())
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 2
    return model, Example(*case.example())


def test_a_language_model_cut_irregularly_says_the_same_at_other_sizes(
    llama: tuple[nn.Module, Example], tmp_path: Path
) -> None:
    model, example = llama
    told: list[tuple[int, int, str]] = []
    written = write(model, tmp_path / "net.onnx", example=example, progress=lambda *one: told.append(one))
    ids = torch.randint(53, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    (logits,) = runs(written.path, input_ids=ids, attention_mask=mask)
    expected = says(model, input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert (logits - expected)[mask.bool()].abs().max() < 1e-4
    assert written.checked["opset"] == onnx.load(written.path).opset_import[0].version == format.OPSET
    assert written.checked["next_tokens_differ"] == 0 < written.checked["next_tokens"]
    assert len([name for name in written.checked if name.startswith("max_abs_diff")]) == 3
    assert "input_ids [batch, sequence] int64" in written.notes[0]
    assert written.bytes == written.path.stat().st_size
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] and left(tmp_path) == ["net.onnx"]


def test_eight_bits_tell_what_they_cost(llama: tuple[nn.Module, Example], tmp_path: Path) -> None:
    model, example = llama
    written = write(model, tmp_path / "net.onnx", example=example, dtype="int8")
    assert "MatMulInteger" in {node.op_type for node in onnx.load(written.path).graph.node}
    assert written.checked["max_abs_diff"] < 1e-4 < written.checked["int8_max_abs_diff"] < 2
    assert 0 < written.checked["int8_next_tokens_differ"] < written.checked["int8_next_tokens"] / 4
    assert "linear layers multiply in 8 bits" in written.notes[-1]


def test_layers_with_outliers_stay_in_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 300), nn.Linear(300, 20))
    with torch.no_grad():
        model[0].bias[7] = 1e3
        model[1].weight[:, 7] = 0
    x = torch.randn(4, 200)
    written = write(model, tmp_path / "net.onnx", dtype="int8", example=Example((x,)))
    assert "2 linear layers multiply in 8 bits; 1 stay in float32" in written.notes[-1]
    assert (runs(written.path, input=x)[0] - says(model, x)).abs().max() < 0.05


def test_half_precision_is_written_in_whole_and_the_network_stays(
    llama: tuple[nn.Module, Example], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(torch.bfloat16).train()
    written = write(model, tmp_path / "net.onnx")
    x = torch.randn(4, 6)
    (answer,) = runs(written.path, **{written.notes[1].split("takes ")[1].split()[0]: x})
    assert (answer - says(model.float(), x)).abs().max() < 1e-5
    assert "bfloat16" in written.notes[0] and model.training


def test_an_image_network_takes_any_batch(tmp_path: Path) -> None:
    model, origin = small("resnet:6-2", (3, 16, 16), 5)
    axes = trace(model, torch.randn(2, 3, 16, 16))
    model, _ = apply(model, axes, laws.random_plan(axes, torch.Generator().manual_seed(0), floor=1))
    written = write(load(save(model, tmp_path / "run", origin=origin)), tmp_path / "net.onnx")
    x = torch.randn(7, 3, 16, 16)
    (answer,) = runs(written.path, input=x)
    assert (answer - says(model.eval(), x)).abs().max() < 1e-4
    assert "input [batch, 3, 16, 16]" in written.notes[0]


def found_cells() -> tuple[Cells, dict[str, Any]]:
    """Cells after a search: half of the operations dropped, every width cut to a number of its own."""
    config = supernet_config((3, 16, 16), 5, width=6, cells=3, nodes=2)
    net = Cells(config).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2), module.bias.data.normal_(0, 0.1)
    axes = trace(net, torch.randn(2, 3, 16, 16))
    gone = [path for i, path in enumerate(axes.branches) if i % 2 and path.rpartition("_")[0][-4:] != "skip"]
    net, axes = apply(net, axes, Plan.dropping(axes, gone))
    net, _ = apply(net, axes, laws.random_plan(axes, torch.Generator().manual_seed(2), floor=2))
    assert sum(isinstance(module, PlaceholderModule) for module in net.modules()) == len(gone) > 20
    return net, config


def test_a_found_network_of_cells_says_the_same(tmp_path: Path) -> None:
    net, config = found_cells()
    written = write(load(save(net, tmp_path / "run", origin=Origin("cells", "", config))), tmp_path / "net.onnx")
    x = torch.randn(5, 3, 16, 16)
    assert (runs(written.path, x=x)[0] - says(net, x)).abs().max() < 1e-4
    assert written.checked["max_abs_diff"] < 1e-4


def test_dropped_branches_are_not_in_the_file(tmp_path: Path) -> None:
    net = ZOO["llama_tied"]
    model, example = net.build(), Example(*net.example())
    axes = with_branches(model, trace(model, *example.args, **example.kwargs))
    model, _ = apply(model, axes, Plan.dropping(axes, ["model.layers.0.mlp", "model.layers.1.self_attn"]))
    written = write(model, tmp_path / "net.onnx", example=example)
    ids = torch.randint(53, (2, 9))
    (logits,) = runs(written.path, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert (logits - says(model, input_ids=ids, use_cache=False).logits).abs().max() < 1e-4
    linear = [node for node in onnx.load(written.path).graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(linear) <= 4 + 2 + 3 + 1 + 1, "one attention, one MLP, the head, the rotary angles"


class Paired(nn.Module):
    """Takes rows in two halves, and so exactly four of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(4, 6).view(2, 12)[:, :6])


def test_a_size_that_cannot_be_open_is_fixed_and_told(tmp_path: Path) -> None:
    model = Paired()
    written = write(model, tmp_path / "net.onnx", example=Example((torch.randn(4, 6),)))
    x = torch.randn(4, 6)
    assert (runs(written.path, x=x)[0] - says(model, x)).abs().max() < 1e-5
    assert "x [4, 6]" in written.notes[0] and "batch is fixed at 4" in written.notes[1]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)), torch.randn(2, 40)
    path = tmp_path / "net.onnx"
    monkeypatch.setattr(format, "LARGEST", 1000)
    # The file in place leads to its own weights until the new one replaces it: new weights take the other name.
    for dtype, weights in (("", "net.onnx.data"), ("int8", "net.onnx.1.data"), ("", "net.onnx.data")):
        written = write(model, path, dtype=dtype)
        assert left(tmp_path) == sorted(["net.onnx", weights])
        assert written.bytes == sum(one.stat().st_size for one in tmp_path.iterdir())
        close = 1e-5 if not dtype else 0.1
        assert (runs(path, input=x)[0] - says(model, x)).abs().max() < close
    monkeypatch.undo()
    write(model, path)
    assert left(tmp_path) == ["net.onnx"], "weights of an earlier file do not stay"


def test_no_file_of_the_user_goes_with_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)), tmp_path / "net.onnx"
    mine = {"net.onnx.data": b"measurements", "net.onnx.1.data": b"more of them"}
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.onnx").symlink_to("net.onnx")
    for limit, weights in ((1000, ["net.onnx.2.data"]), (2_000_000_000, [])):
        monkeypatch.setattr(format, "LARGEST", limit)
        write(model, tmp_path / "link.onnx")
        assert left(tmp_path) == sorted(["link.onnx", "net.onnx", *mine, *weights])
        assert all((tmp_path / name).read_bytes() == data for name, data in mine.items())
        assert (tmp_path / "link.onnx").is_symlink() and runs(path, input=torch.zeros(1, 40))


def put(path: Path, value: float) -> None:
    """Place a small file whose weights lie beside it, as an export does."""
    with stage_folder(path) as stage:
        name = unused_name(path)
        weights = onnx.numpy_helper.from_array(np.full(4, value, np.float32), "w")
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [weights])
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
        more = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 0}
        onnx.save(model, stage / name, **more)
        place_file(stage / name, path)


@pytest.mark.parametrize("moves", [0, 1, 2], ids=["nothing", "the weights", "the weights and the file"])
def test_a_killed_export_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    path = tmp_path / "net.onnx"
    put(path, 1)
    (tmp_path / "net.onnx.7.data").write_bytes(b"the user's")
    child = os.fork()
    if not child:
        real, left_over = Path.replace, [moves]

        def replace(one: Path, other: Path) -> Path:
            if left_over[0]:
                left_over[0] -= 1
                real(one, other)
            if not left_over[0]:
                os._exit(9)
            return other

        monkeypatch.setattr(Path, "replace", replace)
        put(path, 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert runs(path)[0].tolist() == [1 + (moves == 2)] * 4
    put(path, 3)
    assert runs(path)[0].tolist() == [3] * 4
    assert (tmp_path / "net.onnx.7.data").read_bytes() == b"the user's"


class Choosing(nn.Module):
    """Data decide what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x[:, :3]


def test_what_cannot_be_written_is_refused_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("old")
    with pytest.raises(ExportError, match="cannot be written as ONNX") as caught:
        write(Choosing(), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="give an example"):
        write(nn.Sequential(nn.BatchNorm1d(3)), path)
    with pytest.raises(ExportError, match="does not take the example"):
        write(nn.Linear(3, 2), path, example=Example((torch.randn(2, 5),)))
    with pytest.raises(ExportError, match="no linear layer"):
        write(nn.Conv2d(1, 2, 3), path, dtype="int8", example=Example((torch.randn(2, 1, 5, 5),)))
    with pytest.raises(ValueError, match="'float16'"):
        export(nn.Linear(3, 2), path, format="onnx", dtype="float16")
    with pytest.raises(ValueError, match="there is no folder"):
        write(nn.Linear(3, 2), tmp_path / "no" / "net.onnx")
    with pytest.raises(ExportError, match=r"net\.onnx"):
        write(nn.Linear(3, 2), tmp_path / "net.pb")
    monkeypatch.setattr(format, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="away from torch"):
        write(nn.Linear(3, 2), path)
    assert path.read_text() == "old" and left(tmp_path) == ["net.onnx"]


def test_a_guessed_input_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    write(net, tmp_path / "net.onnx")
    assert "example input: 1x1x224x224 (guessed; set it with" in caplog.text
    caplog.clear()
    write(net, tmp_path / "net.onnx", example=Example((torch.zeros(1, 1, 8, 8),)))
    assert "guessed" not in caplog.text
