"""Holes in how a model learns: losses, optimizers, schedules, and in how it writes.

Shapes: T tokens  N batches  V vocabulary  R rows  C columns
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax import evaluate, losses, optimizer, sample, sampling
from gpt_jax.learn.hole import hole, normal
from gpt_jax.optimizer import Hyper

# ---------------------------------------------------------------- losses


def _targets():
    mask = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.0])
    one = (normal(0, 5, 7), jnp.asarray([3, 0, 6, 2, 1]), mask)
    return [one, (50 * normal(1, 5, 7), *one[1:])]


@hole(5, _targets, grads=(0,))
def cross_entropy(logits_TV, target_T, mask_T):
    """Returns the mean loss of the next token in nats, over the tokens that count.

    -log softmax(logits)[target], also of large logits.

    Args:
      logits_TV: float32.
      target_T: int, the right tokens.
      mask_T: 1 where a token counts, else 0.
    """
    how = {"label_smoothing": 0.0, "z_loss": 0.0}
    rows = (logits_TV[None], target_T[None], mask_T[None])
    sums = losses.next_token(*rows, **how)
    return sums["loss"] / sums["weight"]


def _nll(logits_TV, target_T, axis=-1):
    logp_TV = jax.nn.log_softmax(logits_TV, axis=axis)
    return -jnp.take_along_axis(logp_TV, target_T[:, None], 1)[:, 0]


cross_entropy.mistake("tokens that do not count are in the loss: use the mask")(
    lambda logits_TV, target_T, mask_T: _nll(logits_TV, target_T).mean()
)
cross_entropy.mistake("the mean is over the tokens that count: divide by their number")(
    lambda logits_TV, target_T, mask_T: (_nll(logits_TV, target_T) * mask_T).mean()
)
cross_entropy.mistake("the softmax is over the wrong axis: over the vocabulary")(
    lambda logits_TV, target_T, mask_T: (
        (_nll(logits_TV, target_T, axis=0) * mask_T).sum() / mask_T.sum()
    )
)
cross_entropy.mistake("the sign is wrong: a loss is the negative log-probability")(
    lambda logits_TV, target_T, mask_T: (
        -(_nll(logits_TV, target_T) * mask_T).sum() / mask_T.sum()
    )
)
cross_entropy.mistake("exp of a large logit overflows: use logsumexp or log_softmax")(
    lambda logits_TV, target_T, mask_T: (
        -(
            jnp.log(
                jnp.exp(logits_TV)[jnp.arange(len(target_T)), target_T]
                / jnp.exp(logits_TV).sum(-1)
            )
            * mask_T
        ).sum()
        / mask_T.sum()
    )
)


@hole(5, lambda: [(normal(0, 5, 7), jnp.asarray([3, 0, 6, 2, 1]))])
def cross_entropy_grad(logits_TV, target_T):
    """Returns the gradient of the mean loss to the logits, [T, V], by hand.

    No jax.grad: softmax(logits), less 1 at the target, divided by T.

    Args:
      logits_TV: float32.
      target_T: int, the right tokens.
    """
    every_T = jnp.ones(target_T.shape)
    return jax.grad(cross_entropy.real)(logits_TV, target_T, every_T)


def _pull(logits_TV, target_T):
    right_TV = jax.nn.one_hot(target_T, logits_TV.shape[1])
    return jax.nn.softmax(logits_TV) - right_TV


cross_entropy_grad.mistake("of a mean over T tokens each has 1 / T of the gradient")(
    _pull
)
cross_entropy_grad.mistake("the sign is wrong: the target's logit must rise")(
    lambda logits_TV, target_T: -_pull(logits_TV, target_T) / len(target_T)
)
cross_entropy_grad.mistake("the 1 at the target is not taken off")(
    lambda logits_TV, target_T: jax.nn.softmax(logits_TV) / len(target_T)
)


@hole(
    5,
    lambda: [(jnp.asarray([40.0, 3.0]), jnp.asarray([20.0, 1.0]))],
    grads=(),
    traced=False,
)
def perplexity(loss_N, weight_N):
    """Returns exp of the mean loss over all tokens of several batches.

    Args:
      loss_N: losses of batches, each summed over its tokens.
      weight_N: how many tokens each has.
    """
    sums = {"loss": loss_N.sum(), "nll": loss_N.sum(), "weight": weight_N.sum()}
    return evaluate.means(sums)["perplexity"]


perplexity.mistake("batches of few tokens count as much as large ones: add up first")(
    lambda loss_N, weight_N: jnp.exp((loss_N / weight_N).mean())
)
perplexity.mistake("exp of the mean is wanted, not the mean of exp")(
    lambda loss_N, weight_N: jnp.exp(loss_N / weight_N).mean()
)


# ---------------------------------------------------------------- optimizers


def _moves():
    return [
        (normal(0, 6), normal(1, 6), 0 * normal(2, 6), 0 * normal(3, 6), 1, 0.1),
        (normal(0, 6), normal(1, 6), normal(2, 6), normal(3, 6) ** 2, 3, 0.1),
    ]


@hole(5, _moves)
def adamw(weight, grad, mean, square, step, lr):
    """Returns (weight, mean, square) after one step of AdamW.

    beta1 0.9, beta2 0.95, eps 1e-8 (outside the root), weight decay 0.1, which is
    multiplied by the learning rate and knows nothing of the gradient's size.

    Args:
      weight: an array.
      grad: its gradient.
      mean: the running mean of gradients so far.
      square: the running mean of their squares.
      step: 1 at the first step.
      lr: the learning rate.
    """
    rule = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
    state = optax.ScaleByAdamState(jnp.asarray(step - 1), mean, square)
    made: Any = rule.update(grad, state)
    direction, after = made
    return weight - lr * (direction + 0.1 * weight), after.mu, after.nu


def _adam(weight, grad, mean, square, step, lr, *, correct=True, decay="outside",
          root=True):  # fmt: skip
    if decay == "inside":
        grad = grad + 0.1 * weight
    mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
    m = mean / (1 - 0.9**step) if correct else mean
    v = square / (1 - 0.95**step) if correct else square
    move = m / ((jnp.sqrt(v) if root else v) + 1e-8)
    pull = {"outside": 0.1 * lr * weight, "alone": 0.1 * weight}.get(decay, 0.0)
    return weight - lr * move - pull, mean, square


adamw.mistake("the bias correction is forgotten: divide by 1 - beta^step")(
    lambda *args: _adam(*args, correct=False)
)
adamw.mistake("the decay is in the gradient (Adam with L2): it stands beside it")(
    lambda *args: _adam(*args, decay="inside")
)
adamw.mistake("the decay is not multiplied by the learning rate")(
    lambda *args: _adam(*args, decay="alone")
)
adamw.mistake("there is no weight decay")(lambda *args: _adam(*args, decay="none"))
adamw.mistake("the square root of the mean square is missing")(
    lambda *args: _adam(*args, root=False)
)


@hole(5, lambda: [(normal(0, 4, 6),), (normal(1, 3, 3),)])
def orthogonalise(x_RC):
    """Returns a matrix with singular values near 1 and the same spaces (Muon).

    Divide by the root of the sum of squares; then five times
    x <- a x + (b g + c g g) x with g = x x^T and (a, b, c) = (3.4445, -4.775, 2.0315).

    Args:
      x_RC: float32, with R <= C.
    """
    return optimizer.orthogonalise(x_RC[None])[0]


def _rounds(x_RC, rounds=5, norm=True, turned=False):
    a, b, c = optimizer.QUINTIC
    x_RC = x_RC / jnp.sqrt(jnp.square(x_RC).sum()) if norm else x_RC
    for _ in range(rounds):
        g = x_RC.T @ x_RC if turned else x_RC @ x_RC.T
        pull = b * g + c * g @ g
        x_RC = a * x_RC + (x_RC @ pull if turned else pull @ x_RC)
    return x_RC


orthogonalise.mistake("the matrix is not divided by its norm first: it diverges")(
    lambda x_RC: _rounds(x_RC, norm=False)
)
orthogonalise.mistake("five rounds are wanted: yours are four")(
    lambda x_RC: _rounds(x_RC, rounds=4)
)
orthogonalise.mistake("five rounds are wanted: yours is one")(
    lambda x_RC: _rounds(x_RC, rounds=1)
)


def _steps():
    return [(jnp.int32(step), 10, 50, 1e-3, 0.1) for step in (0, 4, 9, 10, 30, 50, 60)]


@hole(5, _steps)
def schedule(step, warmup, total, peak, final_ratio):
    """Returns the learning rate of a step: a warm-up, then half a cosine.

    A line from 0 at step 0 to the peak at step `warmup`; then half a cosine down to
    peak * final_ratio at step `total`, where it stays.

    Args:
      step: int32, from 0; traced.
      warmup: steps.
      total: steps.
      peak: the highest rate.
      final_ratio: the last rate, as a share of the peak.
    """
    blank = Hyper(*(0.0 for _ in Hyper._fields))
    hyper = blank._replace(
        warmup_steps=warmup, decay_steps=total, final_lr_ratio=final_ratio
    )
    return peak * optimizer.cosine(step, hyper)


def _rate(step, warmup, total, peak, final, *, begin=None, add=True, held=True):
    begin = warmup if begin is None else begin
    share = (step - begin) / (total - begin)
    share = jnp.clip(share, 0, 1) if held else share
    half = 0.5 * (1 + jnp.cos(jnp.pi * share))
    after = final + (1 - final) * half if add else half
    return peak * jnp.where(step < warmup, step / warmup, after)


schedule.mistake("the cosine begins where the warm-up ends, not at step 0")(
    lambda *args: _rate(*args, begin=0)
)
schedule.mistake("it falls to 0: the last rate is peak * final_ratio")(
    lambda *args: _rate(*args, add=False)
)
schedule.mistake("behind `total` it rises again: hold it there")(
    lambda *args: _rate(*args, held=False)
)
schedule.mistake("there is no warm-up")(
    lambda step, warmup, total, peak, final: _rate(
        jnp.maximum(step, warmup), warmup, total, peak, final
    )
)


def _slopes_cases():
    tree = {"a": normal(0, 3), "b": normal(1, 2, 2)}
    return [(tree, 1.0), (jax.tree.map(lambda x: 0.01 * x, tree), 1.0)]


@hole(5, _slopes_cases)
def clip(grads, limit):
    """Returns gradients made shorter where they are longer than `limit` together.

    All by one factor, so that their direction stays; shorter ones are left alone.

    Args:
      grads: a pytree of arrays.
      limit: the longest that all may be, as one vector.
    """
    leaves, tree = jax.tree.flatten(grads)
    named = {str(i): x for i, x in enumerate(leaves)}
    clipped = optimizer._clip(named, optax.tree.norm(named), limit)
    return jax.tree.unflatten(tree, list(clipped.values()))


clip.mistake("gradients shorter than the limit must stay: yours are made longer")(
    lambda grads, limit: jax.tree.map(
        lambda x: x * limit / optax.tree.norm(grads), grads
    )
)
clip.mistake("the norm is of all gradients together, not of each array")(
    lambda grads, limit: jax.tree.map(
        lambda x: x * jnp.minimum(1, limit / jnp.linalg.norm(x)), grads
    )
)
clip.mistake("each number was cut by itself: that turns the direction")(
    lambda grads, limit: jax.tree.map(lambda x: jnp.clip(x, -limit, limit), grads)
)


# ---------------------------------------------------------------- sampling


def _sampling(top_k=0, top_p=1.0) -> sample.Sampling:
    return sample.rows_of([sampling.settings(1, top_k=top_k, top_p=top_p)])


def _kept(logits_V, **how):
    tempered = sample.temper(logits_V[None], jnp.ones(1))
    seen_V = jnp.isfinite(sample.keep(tempered, _sampling(**how))[0])
    return jnp.where(seen_V, logits_V, -jnp.inf)


@hole(5, lambda: [(normal(0, 9), 3), (normal(1, 9), 1), (normal(2, 9), 9)])
def top_k(logits_V, k):
    """Returns logits with all but the k largest at minus infinity.

    Args:
      logits_V: float32, all different.
      k: how many stay, from 1 to V.
    """
    return _kept(logits_V, top_k=k)


top_k.mistake("k tokens must stay: yours are k - 1")(
    lambda logits_V, k: jnp.where(logits_V > jnp.sort(logits_V)[-k], logits_V, -jnp.inf)
)
top_k.mistake("the k smallest stayed: sort the other way round")(
    lambda logits_V, k: jnp.where(
        logits_V <= jnp.sort(logits_V)[k - 1], logits_V, -jnp.inf
    )
)
top_k.mistake("what is left out must be minus infinity: a logit of 0 has a chance")(
    lambda logits_V, k: jnp.where(logits_V >= jnp.sort(logits_V)[-k], logits_V, 0.0)
)


@hole(5, lambda: [(2 * normal(s, 9), p) for s, p in ((0, 0.9), (1, 0.5), (2, 0.1))])
def top_p(logits_V, p):
    """Returns logits with all but the fewest that hold a probability p at -infinity.

    The likeliest first, until p is reached; the one that reaches it stays, so at least
    one does.

    Args:
      logits_V: float32, all different.
      p: above 0, below 1.
    """
    return _kept(logits_V, top_p=p)


def _nucleus(logits_V, p, *, reaching=True, turned=False, raw=False):
    order = jnp.argsort(logits_V if turned else -logits_V)
    chance = jax.nn.softmax(logits_V)[order]
    before = jnp.cumsum(chance) - (chance if reaching else 0)
    kept = before < p
    return jnp.where(
        jnp.zeros(len(order), bool).at[order].set(kept), logits_V, -jnp.inf
    )


top_p.mistake("the token that reaches p must stay as well")(
    lambda logits_V, p: _nucleus(logits_V, p, reaching=False)
)
top_p.mistake("begin with the likeliest token: yours begins with the unlikeliest")(
    lambda logits_V, p: _nucleus(logits_V, p, turned=True)
)
top_p.mistake("p is of the sum of probabilities, not what one of them must reach")(
    lambda logits_V, p: jnp.where(jax.nn.softmax(logits_V) >= p, logits_V, -jnp.inf)
)
