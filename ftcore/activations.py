"""Activations: what a forward pass keeps for its backward pass, term by term, and what the backward pass adds at its worst moment.

In: a Shape, what is trained, how many tokens run at once, in which precision. Out: bytes. Runs in: the driver; no torch.

Terms follow the operations that transformers' decoder layers consist of, as autograd keeps their inputs; D hidden width, Q width of all
queries, K of all keys, F of the MLP, T tokens. Each was seen in the tensors saved by real passes (benchmarks/plan_error.py holds the sum
against measured peaks).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ftcore.moved import Moved
from ftcore.shapes import Experts, Layer, Linear, Reads, Shape


@dataclass(frozen=True)
class Pass:
    """One micro-step. `stream`: bytes of a number between layers; `compute`: of one that is multiplied (under autocast: narrower)."""

    tokens: int
    longest: int
    """Tokens of the longest row or segment."""
    stream: int
    compute: int
    varlen: bool = True
    """Segments end to end; else rows, padded to the longest."""
    eager: bool = False
    """Attention that holds its whole [T, T] probabilities."""

    @property
    def casts(self) -> bool:
        """Autocast makes narrow copies of wide inputs and weights."""
        return self.compute < self.stream


def kept_by_layer(shape: Shape, layer: Layer, targets: Set[str], moved: Moved, at: Pass) -> int:
    """Bytes that one decoder layer's forward pass keeps."""
    wide = max(4, at.stream)  # norms compute in fp32, or in what is wider
    per_token = (
        shape.num_norms * shape.hidden * (wide + (at.stream if moved.full else 0))
    )  # x, and x normed, if the norm's weight is trained
    per_token += sum(_kept_inputs(layer, reads, targets, moved, at) for reads in ("attention", "context", "mlp", "product"))
    per_token += _kept_by_attention(shape, moved, at)
    per_token += 3 * layer.width * at.compute  # gate, its activation, up
    if layer.experts:
        per_token += _kept_by_experts(layer.experts, moved, at)
    adapted = [linear for linear in layer.linears if linear.name in targets]
    per_token += sum(moved.rank + (2 * linear.outputs if moved.dora else 0) for linear in adapted) * at.compute
    return per_token * at.tokens + narrow_weights(layer, adapted, moved, at)


def _kept_inputs(layer: Layer, reads: Reads, targets: Set[str], moved: Moved, at: Pass) -> int:
    """Bytes a token for the inputs of the linear layers that read one tensor: needed for the gradient of what multiplies it."""
    mine = [linear for linear in layer.linears if linear.reads == reads and (moved.full or linear.name in targets)]
    if not mine or (reads == "context" and not at.varlen):  # padded, the attention's output is kept anyway, and is the input
        return 0
    one = mine[0].inputs * at.compute
    if moved.full:
        return one * (len(mine) if at.casts and reads in ("attention", "mlp") else 1)  # under autocast each layer casts for itself
    return 2 * one * len(mine) if moved.dropout else one  # each adapter drops for itself: the mask and what is left


def _kept_by_attention(shape: Shape, moved: Moved, at: Pass) -> int:
    """Bytes a token: queries, keys, values, output, and the log of each row's sum; before that, what norms of queries and keys keep."""
    repeated = shape.queries if not at.varlen else shape.keys  # with a mask of padding, keys and values are repeated for their groups
    kept = (2 * shape.queries + 2 * repeated) * at.compute + 4 * shape.heads
    if at.eager:
        kept += shape.heads * at.longest * (4 + at.compute)  # the softmax in fp32, and as it is multiplied
    if shape.qk_norm:
        kept += (shape.queries + shape.keys) * (max(4, at.compute) + (at.compute if moved.full else 0))
    return kept


def _kept_by_experts(experts: Experts, moved: Moved, at: Pass) -> int:
    """Bytes a token, for each expert it passes through: gate and up in one, the activation, its output, three indices; trained: inputs."""
    each = (3 * experts.width + experts.hidden) * at.compute + 3 * 8
    if moved.full:
        each += (experts.width + experts.hidden) * at.compute
    return experts.per_token * each + experts.count * 4 + (experts.hidden * at.compute if moved.full else 0)


def narrow_weights(layer: Layer, adapted: list[Linear], moved: Moved, at: Pass) -> int:
    """Copies of fp32 weights that autocast multiplies with; kept for the gradient of the input, and by autocast till the forward ends."""
    if at.compute >= 4:
        return 0
    if not moved.full:
        return sum(moved.rank * (linear.inputs + linear.outputs) for linear in adapted) * at.compute
    weights = sum(linear.num_weights for linear in layer.linears) + (layer.experts.num_parameters if layer.experts else 0)
    return weights * at.compute if at.casts else 0


def kept_between(shape: Shape, moved: Moved, at: Pass) -> int:
    """What is kept above the layers: the final norm's input, and its normed form if its weight is trained."""
    return at.tokens * shape.hidden * (max(4, at.stream) + (at.stream if moved.full else 0))


def added_by_backward(shape: Shape, moved: Moved, at: Pass, *, quantised: bool) -> int:
    """What the backward pass of one layer needs beside what is kept, at its worst: gradients in the MLP, the residual's, a weight's."""
    widths = [layer.width + (layer.experts.width * layer.experts.per_token if layer.experts else 0) for layer in shape.layers]
    frees = moved.full or any(name.endswith("down_proj") for names in moved.targets for name in names)
    # gradients of the product and of its two factors; the product itself, if it was kept, is gone by then
    inner = max((2 if frees else 3) * max(widths), 2 * shape.queries + shape.keys) * at.compute
    added = at.tokens * (inner + shape.hidden * at.stream)
    if moved.full and shape.tied:
        added += shape.embedding * 4  # the head's part of the embedding's gradient waits for the other part
    if moved.full:
        added += _largest_matrix(shape) * (4 + (at.compute if at.casts else 0))
    elif quantised:
        added += max(linear.num_weights for layer in shape.layers for linear in layer.linears) * at.compute  # made wide, to be multiplied
    return added


def _largest_matrix(shape: Shape) -> int:
    """Elements of the largest tensor inside the layers: its gradient is made before it is added to the bucket."""
    dense = max(linear.num_weights for layer in shape.layers for linear in layer.linears)
    experts = [2 * layer.experts.count * layer.experts.hidden * layer.experts.width for layer in shape.layers if layer.experts]
    return max(dense, *experts) if experts else dense
