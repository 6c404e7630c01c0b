"""Files and folders of others: whatever is read, no code in them is run."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from placement.stats import RoutingStats
from placement.trace import load_trace
from tests.families import tiny_config
from tests.test_house import SOURCES
from tests.trainer.test_safe_reader import Evil
from trainer.data.sources import Document, HFDataset, Reading
from trainer.data.streams import read_stream, write_stream
from trainer.data.tokenizers import ByteTokenizer, HFTokenizer
from trainer.hf_checkpoint import HFCheckpoint
from trainer.modeling import meta_model
from trainer.upcycle.calibration import Tokens, load
from trainer.upcycle.text_routers import read_prompts

CODE = """
from pathlib import Path
Path({mark!r}).mkdir()
from transformers import LlamaConfig as EvilConfig, PreTrainedTokenizerFast as EvilTokenizer
from transformers import LlamaForCausalLM as EvilModel
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def objects(mark: Path) -> np.ndarray:
    """An array whose pickle makes the mark."""
    array = np.empty(1, dtype=object)
    array[0] = Evil(mark)
    return array


def pickled_npz(path: Path, mark: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=objects(mark), source_LRE=objects(mark), format=objects(mark))


def pickled_npy(path: Path, mark: Path) -> None:
    with path.open("wb") as file:
        np.save(file, objects(mark))


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(mark)))


def torch_file(path: Path, mark: Path) -> None:
    torch.save({"weight": Evil(mark)}, path)


WRITERS: list[Callable[[Path, Path], None]] = [pickled_npz, pickled_npy, plain_pickle, torch_file]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("read", [RoutingStats.load, load_trace])
def test_statistics_and_traces(
    read: Callable[[Path], Any], write: Callable[[Path, Path], None], tmp_path: Path, mark: Path
) -> None:
    path = tmp_path / "file.npz"
    write(path, mark)
    with pytest.raises(ValueError, match=r"file\.npz: not a readable"):
        read(path)
    assert not mark.exists()


def careless(path: Path) -> None:
    """Every reader that runs what it reads."""
    for read in (
        lambda: dict(np.load(path, allow_pickle=True)),
        lambda: torch.load(path, weights_only=False),
    ):
        try:
            read()
        except Exception:
            continue


@pytest.mark.parametrize("write", WRITERS)
def test_these_files_would_run_something(
    write: Callable[[Path, Path], None], tmp_path: Path, mark: Path
) -> None:
    write(tmp_path / "file", mark)
    careless(tmp_path / "file")
    assert mark.exists()


@pytest.mark.parametrize("name", ["tokens", "ends"])
@pytest.mark.parametrize("mapped", [False, True])
def test_kept_tokens(name: str, mapped: bool, tmp_path: Path, mark: Path) -> None:
    write_stream(tmp_path, "s", "train", iter([Document("a", "b", "text")]), ByteTokenizer())
    assert len(read_stream(tmp_path, "s", "train", mapped=mapped).tokens) == 5
    path = next(tmp_path.rglob(f"*{name}.npy"))
    pickled_npy(path, mark)
    with pytest.raises(ValueError, match=r"Object arrays cannot be|Array can't be memory-mapped"):
        read_stream(tmp_path, "s", "train", mapped=mapped)
    assert not mark.exists()


def test_yaml_files(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(f"!!python/object/apply:os.mkdir ['{mark}']")
    with pytest.raises(ValueError, match=r"router_init\.prompts \(.*\) cannot be read"):
        read_prompts(str(path))
    assert not mark.exists()


def with_code(folder: Path, mark: Path, names: dict[str, Any], file: str, **fields: Any) -> None:
    """Name code of the folder in one of its configurations."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": names, **fields}))


MODEL_CODE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(tiny_config("mixtral")).save_pretrained(folder)
    return folder


@pytest.fixture
def yes_man(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says y to the question whether code may be run."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.usefixtures("yes_man")
def test_code_of_a_model(model_folder: Path, mark: Path) -> None:
    with_code(model_folder, mark, MODEL_CODE, "config.json", model_type="evil")
    with pytest.raises(ValueError, match=r"code of its own \(auto_map\), which is never run"):
        HFCheckpoint(model_folder)
    assert not mark.exists()


@pytest.mark.usefixtures("yes_man")
def test_a_known_family_is_read_without_the_code_beside_it(model_folder: Path, mark: Path) -> None:
    """Many models keep the code of the time before transformers had their family."""
    with_code(model_folder, mark, MODEL_CODE, "config.json")
    checkpoint = HFCheckpoint(model_folder)
    assert checkpoint.config.model_type == "mixtral"
    assert type(meta_model(checkpoint.config)).__module__.startswith("transformers.models.mixtral")
    tokens = Tokens(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))
    assert type(load(model_folder, tokens)).__module__.startswith("transformers.models.mixtral")
    assert not mark.exists()


@pytest.mark.usefixtures("yes_man")
def test_code_of_a_model_beside_a_family_that_makes_no_text(tmp_path: Path, mark: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with_code(tmp_path, mark, {"AutoModelForCausalLM": "evil.EvilModel"}, "config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(vit\) has no causal language model"):
        meta_model(config)
    assert not mark.exists()


def test_weights_that_are_pickles(model_folder: Path, mark: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    torch_file(model_folder / "pytorch_model.bin", mark)
    with pytest.raises(ValueError, match="only safetensors weights can be read"):
        HFCheckpoint(model_folder)
    tokens = Tokens(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(OSError, match="safetensors"):
        load(model_folder, tokens)
    assert not mark.exists()


@pytest.mark.usefixtures("yes_man")
def test_code_of_a_tokenizer(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save_pretrained(folder)
    names = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    with_code(folder, mark, names, "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(ValueError, match=r"code of its own \(auto_map\), which is never run"):
        HFTokenizer(str(folder))
    assert not mark.exists()


def test_code_of_a_data_set(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(CODE.format(mark=str(mark)))
    for path in (folder, folder / "data.py"):
        with pytest.raises(ValueError, match="datasets cannot load"):
            list(HFDataset(str(path)).documents("train", Reading()))
    assert not mark.exists()


# Calls that read, and what they must say in order to run nothing
MUST_SAY = {
    "np.load": {"allow_pickle": False},
    "AutoConfig.from_pretrained": {"trust_remote_code": False},
    "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
    "AutoModelForCausalLM.from_pretrained": {"trust_remote_code": False, "use_safetensors": True},
}
NEVER = {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "pickle.load"}


def test_every_call_that_reads_says_so() -> None:
    seen = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                allowed = path.name == "safe_reader.py"
                assert allowed or not names & {"pickle", "dill", "joblib", "shelve"}, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in NEVER, f"{path}:{node.lineno}"
            said = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
            for option, value in MUST_SAY.get(name, {}).items():
                assert said.get(option, "nothing") is value, f"{path}:{node.lineno} {option}"
                seen.add(name)
    assert seen == set(MUST_SAY)
