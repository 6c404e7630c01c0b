"""The torch engine against plain training on one process: losses, norms, parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.decisions import checkpoint_contexts, collect_layers
from parallel.mesh import ParallelMesh
from parallel.model import moe_blocks, moe_layers, parallelize
from parallel.planners import home_plan
from tests.parallel.test_families import full_model
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer.balance_loops import auxiliary, by_sequence, moved_bias, z
from trainer.balance.bias import LossFreeBias
from trainer.balance.losses import AuxiliaryLoss, ZLoss
from trainer.engine import TorchEngine
from trainer.state import model_state

STEPS, SEQUENCES, LENGTH = 3, 8, 10
BALANCERS: dict[str, Any] = {
    "none": list,
    "auxiliary": lambda: [AuxiliaryLoss(0.3)],
    "sequence": lambda: [AuxiliaryLoss(0.3, scope="sequence")],
    "global": lambda: [AuxiliaryLoss(0.3, scope="global_batch")],
    "z": lambda: [ZLoss(0.3)],
    "bias": lambda: [LossFreeBias(0.05)],
    "changing bias": lambda: [
        LossFreeBias(0.05, update="proportional", schedule="inverse", recentre=True)
    ],
}


def sequences(step: int, vocab_size: int, number: int = SEQUENCES) -> dict[str, Tensor]:
    """A global batch with uneven numbers of ignored labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab_size, (number, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for sequence in range(number):
        labels[sequence, : sequence % 5] = -100
    positions = torch.arange(LENGTH).expand(number, LENGTH).clone()
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def engine_run(case: dict[str, Any]) -> dict[str, Any]:
    """Train on one rank of several; return metrics and this rank's parameters by logical key."""
    model: Any = full_model(case["family"])
    per_node = case.get("ranks_per_node")
    mesh = ParallelMesh.build(ep=case["ep"], ranks_per_node=per_node, device_type="cpu")
    layers = case.get("layers", {})
    parallelize(model, mesh, planner=case.get("planner", home_plan), **layers)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: make_optimizer(case["optimizer"], m.parameters()),
        make_schedule=constant,
        balancers=BALANCERS[case["balancer"]](),
        recompute=case.get("recompute", False),
        max_grad_norm=case["clip"],
        **case.get("engine", {}),
    )
    metrics, counts = [], []
    number = case.get("sequences", SEQUENCES)
    for step in range(case.get("steps", STEPS)):
        batch = sequences(step, model.config.vocab_size, number)
        mine = torch.arange(mesh.rank, number, mesh.world_size)
        parts = mine.chunk(case["accumulate"])
        stats = engine.train_step([{k: v[part] for k, v in batch.items()} for part in parts])
        metrics.append(stats.metrics)
        counts.append(stats.counts_LE)
    state = {}
    for key, value in model_state(model).items():
        state[key] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return {"metrics": metrics, "state": state, "counts": counts}


def balancing_term(
    case: dict[str, Any], logits_TE: Tensor, ids_TK: Tensor, counts_E: Tensor, sequences: int
) -> Any:
    """A layer's loss of one micro-batch; counts of all ranks in the step so far."""
    if case["balancer"] == "auxiliary":
        return auxiliary(logits_TE, ids_TK)
    if case["balancer"] == "sequence":
        return by_sequence(logits_TE, ids_TK, sequences, sigmoid=case["family"] == "glm4_moe")
    if case["balancer"] == "global":
        return auxiliary(logits_TE, ids_TK, counts=counts_E.tolist())
    return z(logits_TE) if case["balancer"] == "z" else None


def oracle_run(case: dict[str, Any]) -> dict[str, Any]:
    """The same training with the unsplit model on one process."""
    model: Any = full_model(case["family"])
    optimizer = make_optimizer(case["optimizer"], model.parameters())
    blocks = [m for n, m in model.named_modules() if hasattr(m, "experts") and "experts" not in n]
    seen: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        router = getattr(block, "gate", None) or block.router
        router.register_forward_hook(lambda m, i, output: seen.append((output[0], output[2])))
    losses, norms, balance = [], [], []
    num_sequences = case.get("sequences", SEQUENCES)
    for step in range(STEPS):
        batch = sequences(step, model.config.vocab_size, num_sequences)
        tokens = int((batch["labels"] != -100).sum())
        total, extra = 0.0, 0.0
        counts: Any = 0
        world, accumulate = case["world"], case["accumulate"]
        for number in range(accumulate):
            parts, losses_of, seen_of = [], [], []
            for rank in range(world):  # all ranks' micro-batches of one number
                chunks = torch.arange(rank, num_sequences, world).chunk(accumulate)
                if number >= len(chunks):  # fewer sequences than that
                    continue
                part = chunks[number]
                seen.clear()
                logits = model(
                    input_ids=batch["input_ids"][part],
                    position_ids=batch["position_ids"][part],
                    use_cache=False,
                ).logits
                loss = F.cross_entropy(
                    logits.flatten(0, 1), batch["labels"][part].flatten(), reduction="sum"
                )
                total += float(loss.detach()) / tokens
                parts.append(part)
                losses_of.append(loss / tokens)
                seen_of.append(list(seen))
                num_experts = blocks[0].experts.num_experts
                counts = counts + torch.stack(
                    [torch.bincount(ids.flatten(), minlength=num_experts) for _, ids in seen]
                )
            for part, loss, routed in zip(parts, losses_of, seen_of, strict=True):
                for layer, (router_logits, ids) in enumerate(routed):
                    term = balancing_term(case, router_logits, ids, counts[layer], len(part))
                    if term is not None:
                        term = 0.3 * term * len(part) / num_sequences / len(blocks)
                        extra += float(term.detach())
                        loss = loss + term
                loss.backward(retain_graph=True)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if case["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        optimizer.step()
        optimizer.zero_grad()
        if "bias" in case["balancer"]:
            for block, counts_E in zip(blocks, counts, strict=True):
                bias = next(
                    m.e_score_correction_bias
                    for m in block.modules()
                    if hasattr(m, "e_score_correction_bias")
                )
                if case["balancer"] == "bias":
                    moved = moved_bias(bias, counts_E, 0.05)
                else:
                    moved = moved_bias(bias, counts_E, 0.05 / (step + 1), "proportional", True)
                bias.data.copy_(moved.view_as(bias))
        losses.append(total)
        balance.append(extra)
        norms.append(float(norm))
    state = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # the same tensor as the embedding
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".experts"):
            for expert, part in enumerate(value):
                state[f"{prefix}.{expert}.{last}"] = part
        else:
            state[name] = value
    return {"losses": losses, "norms": norms, "balance": balance, "state": state}


def check(case: dict[str, Any], run: Any = engine_run) -> None:
    results, oracle = run_ranks(run, case["world"], case), oracle_run(case)
    rel, keys = case.get("rel", 1e-9), set()
    for result in results:
        for step in range(STEPS):
            metrics = result["metrics"][step]
            assert metrics["train/loss"] == pytest.approx(oracle["losses"][step], rel=rel)
            assert metrics["train/grad_norm"] == pytest.approx(oracle["norms"][step], rel=rel)
            assert metrics["train/balance_loss"] == pytest.approx(
                oracle["balance"][step], rel=1e-6, abs=1e-12
            )
        for key, value in result["state"].items():
            torch.testing.assert_close(
                value,
                oracle["state"][key],
                rtol=max(1e-7, rel),
                atol=max(1e-8, rel),
                msg=key,
            )
        keys.update(result["state"])
    assert keys == set(oracle["state"])


BASE = {"family": "qwen3_moe", "balancer": "none", "optimizer": "adamw", "clip": 0.5}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)])
def test_engine_equals_one_process(world: int, ep: int, accumulate: int) -> None:
    check({**BASE, "world": world, "ep": ep, "accumulate": accumulate})


def test_sgd_shows_gradient_scale() -> None:
    check({**BASE, "world": 4, "ep": 2, "accumulate": 2, "optimizer": "sgd", "clip": 0.0})


def test_experts_split_within_themselves() -> None:
    """One expert per rank and EDP 2: the stacks are sharded on their second dim."""
    check({**BASE, "world": 4, "ep": 2, "accumulate": 1, "family": "two_experts"})


@pytest.mark.parametrize("balancer", ["bias", "changing bias"])
@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe"])
def test_loss_free_bias(family: str, balancer: str) -> None:
    check({**BASE, "world": 2, "ep": 2, "accumulate": 2, "family": family, "balancer": balancer})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("balancer", "family"),
    [
        ("auxiliary", "qwen3_moe"),
        ("sequence", "qwen3_moe"),
        ("global", "qwen3_moe"),
        ("z", "mixtral"),
    ],
)
def test_balancing_losses(balancer: str, family: str, recompute: bool) -> None:
    """Against loops over tokens, on ranks with micro-batches; a repeated forward adds nothing."""
    check(
        {**BASE, "world": 4, "ep": 2, "accumulate": 2, "balancer": balancer, "family": family}
        | {"recompute": recompute}
    )


def test_sequence_loss_of_sigmoids() -> None:
    """This family's router computes in fp32, whatever the model does: as near as that."""
    case = {**BASE, "world": 2, "ep": 2, "accumulate": 2, "balancer": "sequence"}
    check(case | {"family": "glm4_moe", "optimizer": "sgd", "rel": 1e-6})


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "phimoe"])
def test_recompute_keeps_choices_and_counts(family: str) -> None:
    case = {**BASE, "world": 2, "ep": 2, "accumulate": 2, "family": family}
    case["planner"] = RandomPlanner(3)
    plain = run_ranks(engine_run, 2, case)
    again = run_ranks(engine_run, 2, {**case, "recompute": True})
    for a, b in zip(plain, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["counts"], b["counts"], strict=True))
        for key, value in a["state"].items():
            torch.testing.assert_close(b["state"][key], value, rtol=1e-12, atol=1e-12)
        for x, y in zip(a["metrics"], b["metrics"], strict=True):
            assert x["moe/rows"] == y["moe/rows"]


def test_bf16_keeps_fp32_masters_and_routers() -> None:
    results = run_ranks(bf16_run, 2)
    for dtypes, router_dtype, loss in results:
        assert dtypes == {torch.float32}
        assert router_dtype == torch.float32
        assert loss == pytest.approx(results[0][2])


def bf16_run() -> tuple[set[torch.dtype], torch.dtype, float]:
    model: Any = full_model("qwen3_moe").float()
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    parallelize(model, mesh)
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: make_optimizer("adamw", m.parameters()),
        make_schedule=constant,
        balancers=[],
        bf16=True,
    )
    logits = []
    _, block = moe_blocks(model)[0]
    block.gate.register_forward_hook(lambda m, i, output: logits.append(output[0].dtype))
    batch = sequences(0, model.config.vocab_size)
    mine = torch.arange(mesh.rank, SEQUENCES, 2)
    stats = engine.train_step([{k: v[mine] for k, v in batch.items()}])
    assert all(layer.experts.gate_up_proj.dtype == torch.float32 for _, layer in moe_layers(model))
    row_bytes = 2 * model.config.hidden_size  # tokens travel in bf16, there and back
    tokens = SEQUENCES * LENGTH * len(moe_layers(model))
    assert 0 < stats.metrics["moe/bytes_within_nodes"] <= tokens * row_bytes * 2
    return {p.dtype for p in model.parameters()}, logits[0], stats.metrics["train/loss"]


def test_repeated_forward_takes_the_first_choice() -> None:
    """With routers that never choose the same twice, kept choices still fit rows and weights."""
    (gradients,) = run_ranks(flipping_run, 1, True)
    (expected,) = run_ranks(flipping_run, 1, False)
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-10, atol=1e-10)


def flipping_run(recompute: bool) -> dict[str, Tensor]:
    """Gradients of the last layer's experts, whose router sees other scores when repeated."""
    model: Any = full_model("qwen3_moe")
    mesh = ParallelMesh.build(ep=1, device_type="cpu")
    parallelize(model, mesh)
    blocks = moe_blocks(model)
    first_forward = {name: True for name, _ in blocks}
    generator = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(1, 32, generator=generator, dtype=torch.float64) for n, _ in blocks}
    for name, block in blocks:

        def disturb(module: Any, inputs: Any, name: str = name) -> Any:
            flip = 1.0 if first_forward[name] else -1.0  # a repeated router sees other scores
            first_forward[name] = False
            return (inputs[0] + flip * 5.0 * noise[name],)

        block.gate.register_forward_pre_hook(disturb)
    if recompute:
        settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    ids = torch.arange(12).reshape(2, 6)
    with collect_layers() as collected:
        logits = model(input_ids=ids, use_cache=False).logits
        logits.sum().backward()
    assert len(collected.decisions) == len(blocks)
    _, layer = moe_layers(model)[-1]
    return {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
