"""From scores to the next token: transformers' logits processors as pure functions, in the order
`generate` applies them.

Letters: B rows, V vocabulary. Scores are float32 [B, V]; a token that cannot be drawn scores -inf.
"""

import jax
import jax.numpy as jnp

from llasa_jax.generate.settings import SamplingSettings

# Tokens among which top-p is looked for first, without top-k.
BEST = 1024


def penalize_repetition(scores_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Worse scores for tokens that a row has `seen` (bool [B, V]). transformers'
    `RepetitionPenaltyLogitsProcessor`.
    """
    return jnp.where(
        seen_BV, jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV
    )


def keep_allowed(scores_BV: jax.Array, allowed_V: jax.Array) -> jax.Array:
    """Only tokens that are `allowed` (bool [V]). transformers' `SuppressTokensLogitsProcessor`, of
    the others.
    """
    return jnp.where(allowed_V, scores_BV, -jnp.inf)


def keep_top_k(scores_BV: jax.Array, k: int) -> jax.Array:
    """The k best tokens, and those that tie with the last of them. transformers'
    `TopKLogitsWarper`.
    """
    best_BK = jax.lax.top_k(scores_BV, min(k, scores_BV.shape[-1]))[0]
    # Their last one, but as a minimum: of a slice XLA makes a sort of the whole vocabulary, sixty
    # times as slow on a CPU.
    worst_kept = best_BK.min(-1, keepdims=True)
    return jnp.where(scores_BV < worst_kept, -jnp.inf, scores_BV)


def keep_top_p(scores_BV: jax.Array, p: float, best: int = BEST) -> jax.Array:
    """The fewest most probable tokens whose probabilities reach p; always one. transformers'
    `TopPLogitsWarper`.

    Sorting a vocabulary takes a hundred times as long as finding its `best` tokens (B = 64 on a
    CPU: 870 and 6 ms), so all are sorted only where those do not reach p in every row.
    """
    rows = jnp.arange(scores_BV.shape[0])[:, None]
    best_BK, ids_BK = jax.lax.top_k(scores_BV, min(best, scores_BV.shape[-1]))
    chances_BV = jax.nn.softmax(scores_BV, axis=-1)
    chances_BK = chances_BV[rows, ids_BK]
    # What the others have together; some of them may tie with the worst of the best.
    worst_B1 = best_BK.min(-1, keepdims=True)
    others_B = jnp.where(scores_BV <= worst_B1, chances_BV, 0).sum(-1)
    others_B -= jnp.where(best_BK == worst_B1, chances_BK, 0).sum(-1)

    def among_best() -> jax.Array:
        # Summed from the least, as in transformers: near 1 little would be left of small chances.
        below = others_B[:, None] + jnp.cumsum(chances_BK[:, ::-1], axis=-1)[:, ::-1]
        drop = (below <= 1 - p).at[:, 0].set(False)
        kept = jnp.where(drop, -jnp.inf, best_BK)
        return jnp.full_like(scores_BV, -jnp.inf).at[rows, ids_BK].set(kept)

    def among_all() -> jax.Array:
        ascending = jnp.argsort(scores_BV, axis=-1)
        below = jnp.cumsum(chances_BV[rows, ascending], axis=-1)
        drop = (below <= 1 - p).at[:, -1].set(False)
        kept = jnp.where(drop, -jnp.inf, scores_BV[rows, ascending])
        return scores_BV.at[rows, ascending].set(kept)

    return jax.lax.cond(jnp.all(others_B <= 1 - p), among_best, among_all)


def process(
    scores_BV: jax.Array,
    seen_BV: jax.Array | None,
    allowed_V: jax.Array,
    settings: SamplingSettings,
) -> jax.Array:
    """All of the above that `settings` ask for, in HF's order. Greedy goes without temperature,
    top-k and top-p, as in HF. `allowed` is bool [V], or [B, V] where rows differ; `seen` is needed
    for a repetition penalty alone.
    """
    if settings.repetition_penalty != 1:
        assert seen_BV is not None
        scores_BV = penalize_repetition(scores_BV, seen_BV, settings.repetition_penalty)
    scores_BV = keep_allowed(scores_BV, allowed_V)
    if settings.temperature == 0:
        return scores_BV
    scores_BV = scores_BV / settings.temperature
    if settings.top_k:
        scores_BV = keep_top_k(scores_BV, settings.top_k)
    if settings.top_p < 1:
        scores_BV = keep_top_p(scores_BV, settings.top_p, settings.top_k or BEST)
    return scores_BV


def ban(scores_BV: jax.Array, ids_BR: jax.Array, banned_BR: jax.Array) -> jax.Array:
    """Those of `ids` that are `banned` (bool [B, R]) cannot be drawn. An id below 0 is none."""
    rows = jnp.arange(scores_BV.shape[0])[:, None]
    ids_BR = jnp.where(banned_BR & (ids_BR >= 0), ids_BR, scores_BV.shape[-1])
    return scores_BV.at[rows, ids_BR].set(-jnp.inf, mode="drop")


def draw(scores_BV: jax.Array, keys_B: jax.Array, settings: SamplingSettings) -> jax.Array:
    """One token a row, int32 [B], from processed scores. A key for each row, so a row's draw
    depends on no other row.

    One random number a row, looked up in the cumulative probabilities: `jax.random.categorical`
    draws one for each token, which takes longer than the scores themselves do.
    """
    if settings.temperature == 0:
        return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    chances = jnp.exp(scores_BV - scores_BV.max(-1, keepdims=True))
    below = jnp.cumsum(chances, axis=-1)
    wanted = jax.vmap(jax.random.uniform)(keys_B)[:, None] * below[:, -1:]
    # Sums are rounded, so that a token without any chance may seem to have one, and the last sum
    # need not be the largest.
    found = (below > wanted) & (chances > 0)
    best = jnp.argmax(scores_BV, axis=-1)
    return jnp.where(found.any(-1), jnp.argmax(found, axis=-1), best).astype(jnp.int32)
