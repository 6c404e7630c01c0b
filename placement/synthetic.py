"""Synthetic routing with known structure, for tests, benchmarks and sweeps.

T tokens, L MoE layers, K choices, E experts, G topics, V token ids.

A router's choice is modelled as the K best of `log p + Gumbel noise`, which is how a softmax
router with noise behaves. `p` mixes what shapes real routing: the topic of the expert that the
token chose in the layer before (affinity between layers), the topic of its token id, the topics of
its sequence's domain, and the experts' general popularity (Zipf). Experts of one topic therefore
follow each other over the layers and are chosen together within one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.trace import Trace

# Shares of: topic of the layer before, topic of the token id, topics of the domain.
STRENGTHS: dict[str, tuple[float, float, float]] = {
    "none": (0.0, 0.0, 0.0),
    "low": (0.25, 0.15, 0.08),
    "medium": (0.44, 0.20, 0.16),
    "high": (0.55, 0.15, 0.25),
    "domain": (0.22, 0.05, 0.65),
}
NUM_TOKEN_IDS, TOPICS_PER_DOMAIN, BLOCK_TOKENS = 4096, 4, 16384
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SyntheticRouter:
    """A made-up model's routers. The same arguments give the same model.

    Attributes:
        strength: name in STRENGTHS of how strongly routing is structured.
        skew: exponent of the experts' Zipf popularity. num_domains: kinds of text.

    Raises:
        ValueError: for an unknown strength or a size below 1.
    """

    num_layers: int
    num_experts: int
    strength: str = "medium"
    skew: float = 0.3
    num_domains: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength not in STRENGTHS:
            raise ValueError(
                f"strength ({self.strength!r}) must be one of {', '.join(sorted(STRENGTHS))}"
            )
        for name in ("num_layers", "num_experts", "num_domains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be >= 1")
        if self.skew < 0:
            raise ValueError(f"skew ({self.skew}) must be >= 0")

    def sample(self, num_sequences: int, seq_len: int, top_k: int, seed: int = 1) -> Trace:
        """Route `num_sequences` x `seq_len` tokens, each to `top_k` distinct experts per layer.

        Raises:
            ValueError: if `top_k` is not in 1..num_experts.
        """
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(
                f"top_k ({top_k}) must be >= 1 and <= num_experts ({self.num_experts})"
            )
        model, rng = _Model(self), np.random.default_rng([self.seed, seed])
        domain_S = rng.integers(0, self.num_domains, num_sequences)
        domain_T = np.repeat(domain_S, seq_len)
        token_T = model.token_ids(domain_T, rng)
        ids_TLK = np.empty((len(domain_T), self.num_layers, top_k), dtype=np.int32)
        for start in range(0, len(domain_T), BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            ids_TLK[block] = model.route(domain_T[block], token_T[block], top_k, rng)
        sequence_T = np.repeat(np.arange(num_sequences), seq_len)
        return Trace(
            ids_TLK,
            self.num_experts,
            sequence_T=sequence_T,
            token_T=token_T,
            domain_T=domain_T,
        )


class _Model:
    """The probabilities behind a `SyntheticRouter`."""

    def __init__(self, router: SyntheticRouter) -> None:
        rng = np.random.default_rng(router.seed)
        layers, experts = router.num_layers, router.num_experts
        topics = max(2, experts // 4)
        self.shares = STRENGTHS[router.strength]
        zipf_E = 1.0 / np.arange(1, experts + 1) ** router.skew
        self.popular_LE = np.stack([rng.permutation(zipf_E) for _ in range(layers)])
        self.popular_LE /= self.popular_LE.sum(1, keepdims=True)
        self.topic_LE = np.stack([rng.permutation(experts) % topics for _ in range(layers)])
        self.within_LGE = np.zeros((layers, topics, experts))
        for layer in range(layers):
            self.within_LGE[layer, self.topic_LE[layer], np.arange(experts)] = self.popular_LE[
                layer
            ]
        self.within_LGE /= np.maximum(self.within_LGE.sum(2, keepdims=True), 1e-300)
        self.domain_DG = np.zeros((router.num_domains, topics))
        for weights_G in self.domain_DG:
            chosen = rng.choice(topics, min(TOPICS_PER_DOMAIN, topics), replace=False)
            weights_G[chosen] = rng.dirichlet(np.full(len(chosen), 4.0))
        self.topic_V = rng.integers(0, topics, NUM_TOKEN_IDS)
        zipf_V = 1.0 / np.arange(1, NUM_TOKEN_IDS + 1)
        frequency_DV = np.stack(
            [zipf_V + rng.permutation(zipf_V) for _ in range(router.num_domains)]
        )
        self.cumulative_DV = np.cumsum(frequency_DV, 1) / frequency_DV.sum(1, keepdims=True)

    def token_ids(self, domain_T: npt.NDArray, rng: np.random.Generator) -> npt.NDArray:
        """A token id for every token: common ones are common everywhere, others in a domain."""
        uniform_T = rng.random(len(domain_T))
        token_T = np.empty(len(domain_T), dtype=np.int64)
        for domain, cumulative_V in enumerate(self.cumulative_DV):
            here = domain_T == domain
            token_T[here] = np.searchsorted(cumulative_V, uniform_T[here])
        return np.minimum(token_T, NUM_TOKEN_IDS - 1)

    def route(
        self, domain_T: npt.NDArray, token_T: npt.NDArray, top_k: int, rng: np.random.Generator
    ) -> npt.NDArray:
        """Choices int32 [T, L, K], best first."""
        before, token, domain = self.shares
        layers, experts = self.popular_LE.shape
        ids_TLK = np.empty((len(domain_T), layers, top_k), dtype=np.int32)
        topic_T = self.topic_V[token_T]
        for layer in range(layers):
            within_GE = self.within_LGE[layer].astype(np.float32)
            general_DE = domain * (self.domain_DG @ self.within_LGE[layer])
            general_DE += (1 - before - token - domain) * self.popular_LE[layer]
            p_TE = general_DE.astype(np.float32)[domain_T]
            p_TE += before * within_GE[topic_T]
            p_TE += token * within_GE[self.topic_V[token_T]]
            # the K smallest of Exponential(1) / p are the K largest of log p + Gumbel
            race_TE = rng.standard_exponential((len(domain_T), experts), dtype=np.float32)
            race_TE /= np.maximum(p_TE, 1e-12)
            ids_TLK[:, layer] = _smallest(race_TE, top_k)
            topic_T = self.topic_LE[layer][ids_TLK[:, layer, 0]]
        return ids_TLK


def _smallest(race_TE: npt.NDArray, top_k: int) -> npt.NDArray:
    """Places of the K smallest values of every row, in order."""
    if top_k == 1:
        return race_TE.argmin(1)[:, None]
    places_TK = np.argpartition(race_TE, top_k - 1, axis=1)[:, :top_k]
    order_TK = np.take_along_axis(race_TE, places_TK, 1).argsort(1)
    return np.take_along_axis(places_TK, order_TK, 1)
