"""What does a trait's training minimise? The odds between two texts, the distance from the base, and peace between the poles.

    with torch.no_grad(), adapter(model, c=0):
        reference = model(**rows.inputs()).logits                  # rows: the chosen texts, then the rejected ones
        before = ll.completion_nll(reference, rows.ids, rows.completion).chunk(2)
    with adapter(model, c=+1):
        logits = model(**rows.inputs()).logits
    chosen, rejected = ll.completion_nll(logits, rows.ids, rows.completion).chunk(2)
    loss = ll.margin_nll(chosen, rejected, *before) + 10.0 * ll.reference_kl(logits, reference, rows.completion)

Plain functions of tensors: nothing here knows adapters or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Parameter

from lora_lite.steering.arguments import check_whole, is_real, told

Aggregate = Literal["mean", "rmse", "p95"]
LEAST = 1e-6  # probability that the rest of the vocabulary counts as having, so that its logarithm stays finite


def completion_nll(
    logits: Float[Tensor, "n t v"], ids: Int[Tensor, "n t"], completion: Bool[Tensor, "n t"], per_token: bool = False
) -> Float[Tensor, " n"]:
    """-log p of each row's completion given its prompt, in nats: of all its tokens together, or per token. In float32 or wider.

    `completion` marks the tokens that are judged (prompt and padding are not); a row without any is 0, and NaN per token.
    """
    check_rows(logits, completion, ids=ids)
    judged = completion[:, 1:]  # logits at t say what comes at t + 1
    losses = F.cross_entropy(wide(logits[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    total = torch.where(judged, losses, 0.0).sum(1)
    return total / judged.sum(1) if per_token else total


def margin_nll(
    own: Float[Tensor, " n"],
    other: Float[Tensor, " n"],
    own_reference: Float[Tensor, " n"] | float = 0.0,
    other_reference: Float[Tensor, " n"] | float = 0.0,
    cap: float = 3.0,
) -> Float[Tensor, ""]:
    """Pull a pole's own texts and push the other's, each by `cap` nats of `completion_nll` at most; the mean over the texts.

    own, other  -log p now, of the pole's own texts and of the other pole's
    ..._reference  the same at c = 0: a text is pulled until it is `cap` nats likelier than there, pushed until as much less
                likely. Without references the own text is pulled to the end, the other pushed until its nll is `cap`

    mean(relu(cap - (own_reference - own)) + relu(cap - (other - other_reference))). Two hinges and not one over the sum: there
    the push alone, which has no bottom, can pay for both, and takes every text with it. In the grammar of
    examples/two_styles.py, without a KL, one hinge left 52% and 1% valid sentences at c = -1 and +1, two left 90%.
    """
    sizes = [tuple(x.shape) if isinstance(x, Tensor) else told(x) for x in (own, other)]
    if not isinstance(own, Tensor) or sizes[0] != sizes[1] or not own.numel():
        raise ValueError(f"own and other are tensors (n,), -log p of each text, as many of one as of the other; got {sizes}")
    if not is_real(cap) or cap <= 0:
        raise ValueError(f"cap is how many nats a text moves at most, above 0; got {cap!r:.60}")
    pulled, pushed = own_reference - own, other - other_reference
    return ((cap - pulled).relu() + (cap - pushed).relu()).mean()


def reference_kl(
    logits: Float[Tensor, "n t v"],
    reference: Float[Tensor, "n t v"],
    completion: Bool[Tensor, "n t"],
    top_k: int = 64,
    aggregate: Aggregate = "mean",
) -> Float[Tensor, ""]:
    """KL(reference || now) in nats at the places that predict a completion's tokens, over the reference's `top_k` tokens.

    The rest of the vocabulary counts as one token more, so that what leaves the top is seen; the result is a lower bound of the
    whole KL, equal to it for top_k >= v. aggregate over the places: "mean", "rmse" (root of the mean square) or "p95" (the
    95th percentile): one token in a hundred that is far off begins a loop that a mean of many does not show.
    Cost: top_k of the reference, one log-softmax of each.
    """
    check_rows(logits, completion, reference=reference)
    check_whole(1, top_k=top_k)
    judged = completion[:, 1:]
    return aggregated(kl_by_place(logits[:, :-1][judged], reference[:, :-1][judged], top_k), aggregate)


def check_rows(logits: Any, completion: Any, **others: Any) -> None:
    """Raises TypeError or ValueError for what does not belong together: some of it would broadcast into a number that means nothing."""
    given = {"logits": logits, "completion": completion, **others}
    if wrong := {name: type(x).__name__ for name, x in given.items() if not isinstance(x, Tensor)}:
        raise TypeError(
            f"logits (n, t, v), completion (n, t) and {' and '.join(others)} are tensors; got {wrong}. A model's are its .logits"
        )
    if completion.dtype is not torch.bool:
        raise TypeError(
            f"completion marks the tokens that are judged, in torch.bool; got {completion.dtype}: rows.completion, or mask.bool()"
        )
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    same = shapes["completion"] == shapes["logits"][:2] and all(s in (shapes["logits"], shapes["logits"][:2]) for s in shapes.values())
    if logits.ndim != 3 or not same:
        raise ValueError(f"these are not of the same rows and tokens: {shapes}")


def kl_by_place(logits: Float[Tensor, "m v"], reference: Float[Tensor, "m v"], top_k: int) -> Float[Tensor, " m"]:
    q, p = wide(logits).log_softmax(-1), wide(reference).log_softmax(-1)
    if top_k >= p.shape[-1]:
        return kl_terms(p, q).sum(-1)
    p, top = p.topk(top_k)
    q = q.gather(-1, top)
    rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp_min(LEAST) for x in (p, q))
    return kl_terms(p, q).sum(-1) + rest_p * (rest_p / rest_q).log()


def kl_terms(p: Float[Tensor, "*n v"], q: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """p log(p / q) of log probabilities; 0 where p is 0, since a model that forbids words gives them -inf at every c."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q))


def aggregated(kl: Float[Tensor, " m"], how: Aggregate) -> Float[Tensor, ""]:
    if not kl.numel():
        raise ValueError("there is no completion token to compare at; does `completion` mark any beyond the first place?")
    if how == "mean":
        return kl.mean()
    if how == "rmse":
        return torch.linalg.vector_norm(kl) / kl.numel() ** 0.5  # its gradient at 0, where training starts, is 0; that of sqrt is not
    if how == "p95":
        return kl.quantile(0.95)
    raise ValueError(f"no aggregate {how!r}; there are 'mean', 'rmse', 'p95'")


def wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def pcgrad(losses: Sequence[Tensor], parameters: Iterable[Parameter]) -> float:
    """In place of `(up + down).backward()`: add both gradients to `.grad`, each without what it has against the other.

        cosine = ll.pcgrad([up, down], adapter.parameters()); optimizer.step()

    Where the two gradients point apart (a negative inner product, over all parameters as one vector), each is projected onto
    the plane normal to the other; else they are summed as they are. Returns their cosine before that, 0.0 where one is zero.
    Two backward passes: under gradient checkpointing, two recomputes. Raises ValueError for other than two losses.
    Source: arXiv:2001.06782, algorithm 1 for two tasks.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, Sequence) or len(losses) != 2:
        raise ValueError(f"pcgrad takes the losses of the two poles, [up, down]; got {told(losses)}")
    if wrong := [x for x in losses if not isinstance(x, Tensor) or x.numel() != 1 or not x.requires_grad]:
        raise ValueError(f"a loss is one number that depends on what is trained, a tensor with a gradient; got {told(wrong[0])}")
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters are several, adapter.parameters() or [p]; got {told(parameters)}")
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("there is nothing to train: none of these parameters requires gradients")
    before = [p.grad for p in trained]
    up, down = (gradient(loss, trained, keep) for loss, keep in zip(losses, (True, False), strict=True))
    dot, square_up, square_down = inner(up, down), inner(up, up), inner(down, down)
    of_up, of_down = (1 - dot / square_up, 1 - dot / square_down) if dot < 0 else (1.0, 1.0)  # u - (u.d/d.d) d + d - (d.u/u.u) u
    for p, old, u, d in zip(trained, before, up, down, strict=True):
        p.grad = u * of_up + d * of_down if old is None else old + u * of_up + d * of_down
    return dot / (square_up * square_down) ** 0.5 if square_up and square_down else 0.0


def gradient(loss: Tensor, parameters: Sequence[Parameter], retain_graph: bool) -> list[Tensor]:
    """By backward, not by autograd.grad, which reentrant checkpoints refuse."""
    for p in parameters:
        p.grad = None
    loss.backward(retain_graph=retain_graph)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))
