"""Routers against loops over tokens, under expert parallelism, and what their choices depend on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from configs.compose import load
from parallel.mesh import ParallelMesh
from parallel.model import parallelize, router_of
from placement.table import ExpertPlacement
from tests.families import COMMON, tiny_config
from tests.parallel.test_layer import RandomPlanner
from tests.ranks import run_ranks
from tests.trainer import router_loops as loops
from tests.trainer.test_engine import constant, sequences
from trainer.balance.losses import AuxiliaryLoss
from trainer.engine import TorchEngine
from trainer.routers.base import Router
from trainer.routers.capacity import ExpertChoice, Switch
from trainer.routers.chosen import chosen_router
from trainer.routers.family import SIGMOID, SOFTMAX, Family, scores_at
from trainer.routers.fixed import Hash, RandomChoice
from trainer.routers.groups import GroupBalanced, GroupLimited, Prototypes
from trainer.routers.learned import ROUTING
from trainer.routers.threshold import TopP
from trainer.routers.transport import Assignment, Sinkhorn
from trainer.state import model_state

EXPERTS, TOP_K, TOKENS = 8, 2, 24
ROUTERS: dict[str, Any] = {
    "switch": Switch,
    "switch by score": lambda: Switch(0.8, drop="score"),
    "expert choice": ExpertChoice,
    "group balanced": lambda: GroupBalanced(2),
    "prototypes": Prototypes,
    "group limited": lambda: GroupLimited(4, kept=2),
    "sinkhorn": lambda: Sinkhorn(temperature=0.5),
    "selective sinkhorn": lambda: Sinkhorn(share=0.5),
    "assignment": Assignment,
    "top p": lambda: TopP(0.2, most=4),
    "hash": Hash,
    "random": RandomChoice,
}


def fitted(router: Router, top_k: int = TOP_K, ep: int = 2, name: str = "qwen3_moe") -> Any:
    """A router of a softmax family's weights, without a model."""
    router.family = Family(name, EXPERTS, top_k, False, True, 1.0)
    router.mesh, router.passes = SimpleNamespace(rank=0, ep_size=ep), {}  # type: ignore[assignment]
    router.check(router.family)
    return router


def scores(seed: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)).softmax(1)


def chosen(router: Any, scores_TE: Tensor, training: bool = True) -> list[list[int]]:
    ids: list[list[int]] = router.choose(0, scores_TE, scores_TE, training).tolist()
    return ids


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("router", "oracle"),
    [
        (Switch(), lambda s: loops.switch(s, TOP_K, 1.25, "position")),
        (Switch(0.5), lambda s: loops.switch(s, TOP_K, 0.5, "position")),
        (Switch(0.7, drop="score"), lambda s: loops.switch(s, TOP_K, 0.7, "score")),
        (ExpertChoice(), lambda s: loops.expert_choice(s, TOP_K, 1.0)),
        (ExpertChoice(0.01), lambda s: loops.expert_choice(s, TOP_K, 0.01)),
        (GroupBalanced(), lambda s: loops.by_groups(s, 2, 1)),
        (GroupBalanced(1), lambda s: loops.by_groups(s, 1, 2)),
        (Prototypes(), lambda s: loops.by_groups(s, 2, 1)),
        (GroupLimited(4, kept=1), lambda s: loops.group_limited(s, TOP_K, 4, 1)),
        (GroupLimited(kept=1), lambda s: loops.group_limited(s, TOP_K, 2, 1)),
        (Sinkhorn(), lambda s: loops.sinkhorn(s, TOP_K, 8, 1.0)),
        (Sinkhorn(3, temperature=0.4), lambda s: loops.sinkhorn(s, TOP_K, 3, 0.4)),
        (TopP(0.6, most=5), lambda s: loops.top_p(s, 0.6, 5)),
        (TopP(1.0), lambda s: loops.top_p(s, 1.0, TOP_K)),
    ],
)
def test_choices(router: Router, oracle: Any, seed: int) -> None:
    one = [] if isinstance(router, Sinkhorn) else [1]  # a single token's scores are evened to ties
    for tokens in (TOKENS, 7, *one):
        scores_TE = scores(seed, tokens)
        assert chosen(fitted(router), scores_TE) == oracle(scores_TE)


def test_assignment_is_even_and_the_best() -> None:
    for seed in range(5):
        scores_TE = scores(seed, 8)[:, :4]
        router = fitted(Assignment(), top_k=1)
        ids_T1 = torch.tensor(chosen(router, scores_TE))
        assert torch.bincount(ids_T1.flatten(), minlength=4).tolist() == [2] * 4
        total = float(scores_TE.gather(1, ids_T1).sum())
        assert total == pytest.approx(loops.assigned_score(scores_TE), rel=1e-9)
    with pytest.raises(ValueError, match="7 tokens cannot be shared evenly among 8 experts"):
        chosen(router, scores(0, 7))


def test_sinkhorn_evens_out_and_evaluation_does_not() -> None:
    scores_TE = (scores(0, 400) * torch.arange(1, 9)).double()  # experts of unlike popularity
    router = fitted(Sinkhorn(30, temperature=0.3))
    even, plain = (
        torch.bincount(torch.tensor(chosen(router, scores_TE, training)).flatten(), minlength=8)
        for training in (True, False)
    )
    assert even.max() <= 120 and even.min() >= 90 and plain.max() > 135 and plain.min() < 30


def test_fixed_choices() -> None:
    """By token id, or by seed, step and micro-batch; weights are alike."""
    router = fitted(Hash())
    router.draw(1, 50, torch.device("cpu"))
    router.token_T = torch.randint(0, 50, (TOKENS,))
    rows = chosen(router, scores(0))
    by_id: dict[int, list[int]] = {}
    for token, row in zip(router.token_T.tolist(), rows, strict=True):
        assert len(set(row)) == TOP_K and by_id.setdefault(token, row) == row
    assert len({tuple(row) for row in by_id.values()}) > 5
    draws = [fitted(RandomChoice(seed)) for seed in (0, 0, 1)]
    first, again, other = (chosen(each, scores(0)) for each in draws)
    assert first == again != other
    assert chosen(draws[0], scores(0)) != first  # the next micro-batch
    draws[0].before_step(1)
    assert chosen(draws[0], scores(0)) == first  # the step again
    draws[0].after_step(torch.zeros(1))
    draws[0].before_step(1)
    assert chosen(draws[0], scores(0)) != first
    assert chosen(draws[0], scores(0), False) == chosen(draws[0], scores(0), False)
    weights = draws[0].weigh(scores(0), torch.tensor(first))
    assert torch.equal(weights, torch.full((TOKENS, TOP_K), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_and_their_gradient(name: str) -> None:
    """Scores of the chosen experts, divided as the router says; nothing for "no expert"."""
    router = fitted(ROUTERS[name](), top_k=1 if name == "assignment" else TOP_K)
    if name == "hash":
        router.draw(1, 9, torch.device("cpu"))
        router.token_T = torch.arange(TOKENS) % 9
    logits_TE = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    scores_TE = logits_TE.softmax(1)
    ids_TK = router.choose(0, scores_TE, scores_TE.detach(), True)
    weights_TK = router.weigh(scores_TE, ids_TK)
    if name in ("hash", "random"):
        assert not weights_TK.requires_grad
        return
    want = []
    for token, row in enumerate(ids_TK.tolist()):
        exps = [logits_TE[token, e].exp() for e in range(EXPERTS)]
        value = [exps[e] / sum(exps) if e < EXPERTS else None for e in row]
        total: Any = 1.0
        if name == "prototypes":
            half = EXPERTS // 2
            value = [exps[e] / sum(exps[(e // half) * half :][:half]) for e in row]
        elif name not in ("expert choice", "top p", "assignment"):
            total = sum(each for each in value if each is not None) or 1.0
        zero = logits_TE.new_zeros(())
        want.append(torch.stack([zero if each is None else each / total for each in value]))
    want_TK = torch.stack(want)
    torch.testing.assert_close(weights_TK, want_TK, rtol=1e-10, atol=1e-12)
    factor_TK = torch.randn_like(want_TK)
    got, expected = (
        torch.autograd.grad((w * factor_TK).sum(), logits_TE, retain_graph=True)[0]
        for w in (weights_TK, want_TK)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_what_choices_depend_on(name: str) -> None:
    """Earlier tokens of a sequence alone, unless the router says otherwise; what is said is so.
    Outputs of a sequence alone and beside two others tell whether it is coupled to them."""
    looked = coupled = False
    for seed in range(6):
        router = fitted(ROUTERS[name](), top_k=1 if name == "assignment" else TOP_K)
        router.step = 2
        if name == "hash":
            router.draw(1, 9, torch.device("cpu"))

        def rows(scores_TE: Tensor, router: Any = router) -> list[list[int]]:
            router.token_T = torch.arange(len(scores_TE)) % 8
            router.passes = {}
            return chosen(router, scores_TE)

        first, others = scores(seed, 16), scores(seed + 10, 16)
        changed = torch.cat([first[:8], others[8:]])
        looked |= rows(first)[:8] != rows(changed)[:8]
        beside = [rows(torch.cat([other, first]))[16:] for other in (others, scores(99, 16))]
        coupled |= beside[0] != beside[1]
    assert looked == router.looks_ahead
    assert coupled == router.is_coupled


@pytest.mark.parametrize("name", [name for name in ROUTERS if ROUTERS[name]().exports])
def test_what_exports_chooses_in_evaluation_as_the_family_does(name: str) -> None:
    router = fitted(ROUTERS[name]())
    for seed in range(3):
        scores_TE = scores(seed)
        assert chosen(router, scores_TE, training=False) == [
            loops.best(row, TOP_K) for row in scores_TE.tolist()
        ]


@pytest.mark.parametrize("family", [*SOFTMAX, *SIGMOID])
def test_weights_are_the_familys(family: str) -> None:
    """For the experts that its own router chose."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**COMMON, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
        config: Any = (
            AutoConfig.for_model(family, **sizes) if family == "flex_olmo" else tiny_config(family)
        )
        model: Any = AutoModelForCausalLM.from_config(config).double()
    known = Family.of(model)
    own: Any = next(router_of(m) for m in model.modules() if hasattr(m, "experts"))
    nn.init.normal_(own.weight)
    hidden_TH = torch.randn(1, 20, own.weight.shape[1], dtype=torch.float64)
    hidden = hidden_TH if family == "deepseek_v3" else hidden_TH[0]
    logits_TE, weights_TK, ids_TK = own(hidden)
    got_TK = known.weights(known.scores(logits_TE), ids_TK)
    torch.testing.assert_close(got_TK.to(weights_TK.dtype), weights_TK, rtol=1e-5, atol=1e-7)


def engine_run(
    make: Callable[[], Router], ep: int, family: str, recompute: bool
) -> tuple[Any, ...]:
    """Losses, rows and router weights after three steps, on one rank of several."""
    router = make()
    one = {"num_experts_per_tok": 1, "num_experts": 4} if isinstance(router, Assignment) else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **one)).double()
    mesh = ParallelMesh.build(ep=ep, device_type="cpu")
    parallelize(model, mesh, planner=RandomPlanner(3))
    engine = TorchEngine(
        model,
        mesh,
        make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
        make_schedule=constant,
        balancers=[router, AuxiliaryLoss(0.1)],
        recompute=recompute,
    )
    seen: list[Any] = []
    for step in range(3):
        batch = sequences(step, model.config.vocab_size)
        # of four: one a rank, or all of them in turn
        parts = [torch.arange(n, 8, 4) for n in range(mesh.rank, 4, mesh.world_size)]
        stats = engine.train_step([{k: v[part] for k, v in batch.items()} for part in parts])
        seen.append((stats.metrics["train/loss"], stats.metrics["train/balance_loss"]))
        seen.append(stats.metrics["moe/rows"])
    state = model_state(model)
    weights = {key: whole(state[key]) for key in state if ".0.mlp.gate" in key or ROUTING in key}
    return seen, weights, router.state_dict()


def whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()


def check_alike(wide: list[Any], alone: Any) -> None:
    """What ranks saw and what one process saw."""
    for seen, weights, state in wide:
        assert state == alone[2]
        for got, want in zip(seen, alone[0], strict=True):
            assert got == pytest.approx(want, rel=1e-6)
        assert weights.keys() == alone[1].keys() != set()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, alone[1][key], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "random"])
def test_expert_parallelism_changes_nothing(name: str, recompute: bool) -> None:
    """Four ranks of two, a micro-batch each, and one process with four micro-batches."""
    family = "glm4_moe" if name in ("switch", "group balanced") else "qwen3_moe"
    wide = run_ranks(engine_run, 4, ROUTERS[name], 2, family, recompute)
    (alone,) = run_ranks(engine_run, 1, ROUTERS[name], 1, family, False)
    assert alone[2] == {"step": 4}
    check_alike(wide, alone)


def elsewhere(groups: int | None) -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    mesh = ParallelMesh.build(ep=2, device_type="cpu")
    homes = torch.tensor([0, 1] * (model.config.num_experts // 2))
    home_LE = homes.expand(model.config.num_hidden_layers, -1)
    parallelize(model, mesh, placement=ExpertPlacement(home_LE, 2))
    GroupBalanced(groups).attach(model, mesh)


def test_groups_of_ranks_need_their_homes() -> None:
    run_ranks(elsewhere, 2, 2)
    with pytest.raises(AssertionError, match=r"router.groups \(null\) is one group of neighbour"):
        run_ranks(elsewhere, 2, None)


def test_random_choices_are_kept_in_a_repeated_forward() -> None:
    plain, again = (
        run_ranks(engine_run, 2, RandomChoice, 2, "qwen3_moe", r) for r in (False, True)
    )
    for a, b in zip(plain, again, strict=True):
        assert a[0] == b[0] and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Switch(0), r"router.capacity \(0\) must be > 0"),
        (lambda: Switch(drop="any"), r"router.drop \(any\) must be position or score"),
        (
            lambda: fitted(GroupBalanced(3)),
            r"router.groups \(3\) must divide the number",
        ),
        (
            lambda: fitted(GroupBalanced(4)),
            r"router.groups \(4\) must divide the experts",
        ),
        (lambda: fitted(GroupLimited(4, kept=5)), r"router.kept \(5\) must be between 1 and"),
        (lambda: fitted(GroupLimited(8, kept=1)), r"router.kept \(1\) groups have 1 experts"),
        (lambda: fitted(TopP(0.5, most=9)), r"router.most \(9\) must be between 1 and"),
        (lambda: TopP(0), r"router.p \(0\) must be > 0"),
        (lambda: Sinkhorn(share=0), r"router.share \(0\) must be > 0"),
        (lambda: fitted(Assignment()), r"router=assignment gives a token one expert, the model 2"),
    ],
)
def test_refusals(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


@pytest.mark.parametrize(
    ("overrides", "family", "why"),
    [
        (["router=expert_choice"], "qwen3_moe", r"router \(ExpertChoice\) lets .* later tokens"),
        (["router=switch", "router.drop=score"], "qwen3_moe", r"router \(Switch\) lets"),
        (["router=hash", "checkpoint.export=true"], "mixtral", r"would write a mixtral in which"),
        (["router=switch"], "gpt_oss", r"only router=native is known for gpt_oss"),
        (
            ["router=group_balanced", "relocate.every=5", "stats.every=1"],
            "qwen3_moe",
            r"relocate.every \(5\) would move experts out of their rank's group",
        ),
        (["router=rectified"], "qwen3_moe", r"router \(Rectified\) lets"),
        (["router=cosine", "balance=coupling"], "qwen3_moe", r"router \(Cosine\) does not use"),
    ],
)
def test_what_does_not_fit_a_run(overrides: list[str], family: str, why: str) -> None:
    config = load("experiment=quickstart", "checkpoint.export=false", *overrides)
    model: Any = SimpleNamespace(config=tiny_config(family), modules=list)
    mesh: Any = SimpleNamespace(ep_size=2, rank=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    with pytest.raises(ValueError, match=why):
        chosen_router(config, model, mesh)


def test_scores_of_no_expert_are_nothing() -> None:
    assert scores_at(torch.ones(2, 3), torch.tensor([[0, 3], [3, 3]])).tolist() == [[1, 0], [0, 0]]
