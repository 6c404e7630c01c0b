"""Secrets are known by name or form; masked where configurations are saved, refused in commands."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from configs.compose import load, load_upcycle, to_yaml
from configs.errors import COMPOSE_ERRORS, explain
from configs.secrets import masked, masked_text, refuse_secrets

HF = "hf_abcdefghijklmnopqrst"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("api_key", "abc", "***"),
        ("WANDB_API_KEY", "abc", "***"),
        ("hf_token", "12ab", "***"),
        ("authorization", "abc", "***"),
        ("tokens", ["a", "b"], ["***", "***"]),
        ("password", 1234, "***"),
        ("api_key", 1234, "***"),
        ("api_key", None, None),
        ("api_key", "", ""),
        ("tokenizer", "bpe", "bpe"),
        ("author", "Ada", "Ada"),
        ("num_key_value_heads", 4, 4),
        ("eos_token_id", 2, 2),
        ("by_token", True, True),
        ("path", f"/data/{HF}/x", "/data/***/x"),
        ("path", "https://me:abc@host/x?token=abc&b=1", "https://***@host/x?token=***&b=1"),
        ("path", "s3://bucket/a@b", "s3://bucket/a@b"),
        ("header", "Bearer abc.def", "Bearer ***"),
        ("dir", "runs/task-with-a-very-long-name-2", "runs/task-with-a-very-long-name-2"),
    ],
)
def test_names_and_forms(name: str, value: Any, expected: Any) -> None:
    assert masked({"a": {name: value}}) == {"a": {name: expected}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+logger.x.api_key=abc", "+logger.x.api_key=***"),
        ("+logger.x.api_key='a, b'", "+logger.x.api_key=***"),
        ("seed=1,logger.x.token=abc,train.steps=2", "seed=1,logger.x.token=***,train.steps=2"),
        ("+logger.x.tokens=[abc,b]", "+logger.x.tokens=***"),
        ("+logger.x={api_key:abc, dir: y}", "+logger.x={api_key:***, dir: y}"),
        ("+logger=[{dir: y, api_key: 'abc'}]", "+logger=[{dir: y, api_key: ***}]"),
        ("+x={token: '${oc.env:A_TOKEN}'}", "+x={token: '${oc.env:A_TOKEN}'}"),
        ("+x.token=${oc.env:A_TOKEN}", "+x.token=${oc.env:A_TOKEN}"),
        ("+x.token='${oc.env:A_TOKEN}'", "+x.token='${oc.env:A_TOKEN}'"),
        ("data/tokenizer=bpe", "data/tokenizer=bpe"),
        ("stats.by_token=true", "stats.by_token=true"),
        ("model.overrides.num_key_value_heads=2", "model.overrides.num_key_value_heads=2"),
        (f"model.source={HF}", "model.source=***"),
    ],
)
def test_overrides(text: str, expected: str) -> None:
    assert masked_text(text) == expected
    if text == expected:
        refuse_secrets([text])
    else:
        with pytest.raises(ValueError, match=r"write '.*=\$\{oc\.env:NAME\}'") as refused:
            refuse_secrets(["seed=1", text])
        assert "abc" not in str(refused.value) and HF not in str(refused.value)


def test_what_is_saved_has_no_secrets_and_what_runs_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefg")
    node = "+logger.mine={_target_:trainer.loggers.Wandb,dir:x,name:y,project:'${oc.env:MY_TOKEN}'}"
    config = load("experiment=quickstart", node, f"run.dir=https://u:hush@host/{HF}")
    config.logger["mine"]["api_key"] = "abcdefg"
    assert config.run.dir == f"https://u:hush@host/{HF}"
    saved = OmegaConf.create(to_yaml(config))
    assert saved.run.dir == "https://***@host/***"
    assert saved.logger.mine.api_key == "***"
    conversion = load_upcycle("source=https://u:hush@host/x", "target_dir=y")
    assert conversion.resolved["source"] == "https://***@host/x"


@pytest.mark.parametrize(
    "override", ["run.token=hush", "+logger.x.api_key=[hush", "train.api_key=hush"]
)
def test_errors_do_not_echo_secrets(override: str) -> None:
    with pytest.raises(COMPOSE_ERRORS) as refused:
        load("experiment=quickstart", override)
    assert "hush" not in explain(refused.value)
