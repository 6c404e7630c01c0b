"""Export to Hugging Face directories and import from them, against the library's own files."""

from __future__ import annotations

import json
import resource
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from tests.families import FAMILIES, tiny_config
from trainer.export import HFCheckpoint, export_model, export_order


def random_model(family: str, **overrides: Any) -> Any:
    """Every parameter and buffer of its own random values, selection biases included."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def logical_state(model: Any) -> dict[str, Tensor]:
    """The slow, obvious split: stacks of the `experts` modules row by row, the rest as it is."""
    tied = model.config.tie_word_embeddings
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if tied and name == "lm_head.weight":
            continue
        if module.endswith(".experts"):
            for expert in range(8):
                state[f"{module}.{expert}.{parameter}"] = tensor[expert]
        else:
            state[name] = tensor
    return state


def files_state(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded = load_file(file)
        assert not state.keys() & loaded.keys()
        state.update(loaded)
    return state


def assert_same(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same keys, dtypes, shapes and bytes."""
    assert sorted(have) == sorted(want)
    for key, tensor in want.items():
        assert have[key].dtype == tensor.dtype, key
        assert have[key].shape == tensor.shape, key
        assert raw_bytes(have[key]).equal(raw_bytes(tensor)), key


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def load(path: Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", **kwargs
    )
    model, info = loaded
    model.set_experts_implementation("eager")
    return model.eval(), {k: v for k, v in info.items() if v}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_out_and_in(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    ours, theirs, fused = tmp_path / "ours", tmp_path / "theirs", tmp_path / "fused"
    export_model(model.config, logical_state(model), ours)
    model.save_pretrained(theirs)
    model.save_pretrained(fused, save_original_format=False)

    assert_same(files_state(ours), files_state(theirs))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    loaded, problems = load(ours)
    assert problems == {}
    assert torch.equal(logits(loaded), logits(model))

    want = logical_state(model)
    for path in (ours, theirs, fused):
        checkpoint = HFCheckpoint(path)
        assert_same({key: checkpoint.read(key) for key in checkpoint.logical_keys()}, want)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "gpt_oss"])
def test_bf16_files_keep_what_the_library_keeps_in_fp32(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    export_model(model.config, logical_state(model), tmp_path / "fp32")
    export_model(model.config, logical_state(model), tmp_path / "ours", dtype=torch.bfloat16)
    oracle, _ = load(tmp_path / "fp32", dtype=torch.bfloat16)
    oracle.save_pretrained(tmp_path / "theirs")

    ours = files_state(tmp_path / "ours")
    assert_same(ours, files_state(tmp_path / "theirs"))
    biases = [key for key in ours if key.endswith("e_score_correction_bias")]
    assert all(ours[key].dtype == torch.float32 for key in biases)
    assert bool(biases) == (family in ("deepseek_v3", "ernie4_5_moe"))
    content = (tmp_path / "ours/model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    by_offset = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    wide = [entry["dtype"] == "F32" for entry in by_offset]
    assert wide == sorted(wide, reverse=True), "narrow tensors first leave wide ones unaligned"
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "bfloat16"
    loaded, problems = load(tmp_path / "ours", dtype="auto")
    assert problems == {}
    assert torch.equal(logits(loaded), logits(oracle))


def test_default_dtype_is_that_of_the_configuration(tmp_path: Path) -> None:
    model = random_model("mixtral", dtype="bfloat16")
    export_model(model.config, logical_state(model), tmp_path / "ours")
    assert {t.dtype for t in files_state(tmp_path / "ours").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_shards_are_bounded_and_indexed(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    limit = 60_000
    export_model(model.config, logical_state(model), tmp_path / "ours", max_shard_bytes=limit)
    model.save_pretrained(tmp_path / "theirs")
    want = files_state(tmp_path / "theirs")
    assert_same(files_state(tmp_path / "ours"), want)

    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2
    assert [s.name for s in shards] == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    for shard in shards:
        held = load_file(shard)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
        assert all(index["weight_map"][key] == shard.name for key in held)
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert not list((tmp_path / "ours").glob("*.tmp"))
    loaded, problems = load(tmp_path / "ours")
    assert problems == {}
    assert torch.equal(logits(loaded), logits(model))


class Counted:
    """Tensors made when asked for, that know how many of them are alive."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.asked: list[str] = []
        self.largest_alive = 0
        self.alive: list[Any] = []

    def keys(self) -> list[str]:
        return list(self.state)

    def __getitem__(self, key: str) -> Tensor:
        self.asked.append(key)
        tensor = self.state[key].clone()
        storage = tensor.untyped_storage()
        self.alive = [r for r in self.alive if r() is not None] + [weakref.ref(storage)]
        self.largest_alive = max(self.largest_alive, len(self.alive))
        return tensor


def test_tensors_are_asked_for_once_in_order_and_let_go(tmp_path: Path) -> None:
    model = random_model("glm4_moe")
    source = Counted(logical_state(model))
    export_model(model.config, source, tmp_path / "ours")
    assert source.asked == export_order(model.config)
    assert sorted(source.asked) == sorted(source.state)
    assert source.largest_alive <= 2


def test_import_reads_only_the_bytes_of_its_key(tmp_path: Path) -> None:
    """With every other byte of the data overwritten the expert still reads right."""
    model = random_model("qwen3_moe")
    for layout, fused in (("split", True), ("fused", False)):
        model.save_pretrained(tmp_path / layout, save_original_format=fused)
    want = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][5]
    for layout in ("split", "fused"):
        file = tmp_path / layout / "model.safetensors"
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        prefix = "model.layers.1.mlp.experts"
        keep = [f"{prefix}.5.gate_proj.weight", f"{prefix}.5.up_proj.weight"]
        spans = [header[key]["data_offsets"] for key in keep if key in header]
        if not spans:
            begin, end = header[f"{prefix}.gate_up_proj"]["data_offsets"]
            row = (end - begin) // 8
            spans = [(begin + 5 * row, begin + 6 * row)]
        wiped = bytearray(b"\xff") * (len(content) - start)
        for begin, end in spans:
            wiped[begin:end] = content[start + begin : start + end]
        file.write_bytes(content[:start] + wiped)
        assert torch.equal(HFCheckpoint(file.parent).read(f"{prefix}.5.gate_up_proj"), want)
        assert HFCheckpoint(file.parent).read(f"{prefix}.4.gate_up_proj").isnan().all()


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", tie_word_embeddings=True)
    export_model(model.config, logical_state(model), tmp_path / "ours")
    assert "lm_head.weight" not in files_state(tmp_path / "ours")
    loaded, problems = load(tmp_path / "ours")
    assert problems == {}
    assert torch.equal(logits(loaded), logits(model))
    assert "lm_head.weight" not in HFCheckpoint(tmp_path / "ours").logical_keys()


def test_tokenizer_and_generation_config_travel(tmp_path: Path) -> None:
    model = random_model("olmoe")
    words = Tokenizer(WordLevel({"<unk>": 0, "level": 1, "keel": 2}, unk_token="<unk>"))
    tokenizer = FastTokenizer(tokenizer_object=words, unk_token="<unk>")
    generation = GenerationConfig(max_new_tokens=17, eos_token_id=2)
    export_model(
        model.config,
        logical_state(model),
        tmp_path / "ours",
        tokenizer=tokenizer,
        generation_config=generation,
    )
    assert GenerationConfig.from_pretrained(tmp_path / "ours").max_new_tokens == 17
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()


def test_a_dense_model_goes_out_and_in(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    export_model(config, logical_state(model), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert_same(files_state(tmp_path / "ours"), files_state(tmp_path / "theirs"))
    checkpoint = HFCheckpoint(tmp_path / "ours")
    have = {key: checkpoint.read(key) for key in checkpoint.logical_keys()}
    assert_same(have, logical_state(model))


def test_target_must_be_empty_before_any_work(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    source = Counted({})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"old is not empty.*remove it or choose another"):
        export_model(config, source, tmp_path / "old")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; choose a directory"):
        export_model(config, source, tmp_path / "file")
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == b"precious"
    assert source.asked == []


def test_keys_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    model = random_model("ernie4_5_moe")
    state = logical_state(model)
    lost = "model.layers.1.mlp.experts.3.down_proj"
    missing = {key: tensor for key, tensor in state.items() if key != lost}
    with pytest.raises(ValueError, match=f"1 tensors of ernie4_5_moe are missing, first {lost}"):
        export_model(model.config, missing, tmp_path / "ours")
    surplus = {**state, "model.layers.2.mlp.experts.3.down_proj": state[lost]}
    with pytest.raises(ValueError, match=r"superfluous, first model.layers.2\S* \(not of this"):
        export_model(model.config, surplus, tmp_path / "ours")
    tied = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    with pytest.raises(ValueError, match=r"superfluous, first lm_head.weight \(tied"):
        export_model(model.config, tied, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tensor_of_the_wrong_shape_leaves_no_loadable_model(tmp_path: Path) -> None:
    model = random_model("mixtral")
    state = logical_state(model)
    key = "model.layers.1.mlp.experts.3.down_proj"
    state[key] = state[key].T
    with pytest.raises(ValueError, match=rf"{key} has shape \[24, 32\].*\[32, 24\]"):
        export_model(model.config, state, tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*safetensors*"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files over 100 kB, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_names_the_file_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    model = random_model("mixtral")
    with pytest.raises(OSError, match=r"cannot write \S*ours/model.safetensors: .*too large.*free"):
        export_model(model.config, logical_state(model), tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*safetensors*"))


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("mixtral")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"ours needs \d+ bytes, 1000 are free"):
        export_model(model.config, logical_state(model), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
