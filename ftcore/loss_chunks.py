"""Loss chunks: how many rows of logits are held at once, and what the loss holds beside them.

In: vocabulary, hidden width, trained tokens. Out: rows a chunk; bytes. Runs in: train workers (rows), the driver (bytes); no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once: 4 Mi elements, 16 MiB in fp32."""


def chunk_rows(vocabulary: int) -> int:
    return max(16, CHUNK_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class Head:
    """What the loss meets. Bytes are of one number: of hidden states (`stream`), of what is multiplied (`compute`), of the weight."""

    vocabulary: int
    hidden: int
    stream: int
    compute: int
    weight: int
    trained: bool
    linear: bool
    """A plain linear layer: the gradient is taken on the way (losses._LinearCrossEntropy), else chunks are checkpointed."""
    exact: bool = True
    """head(hidden) gives the model's own logits; else these are made whole."""


def loss_bytes(head: Head, tokens: int, trained_tokens: int) -> tuple[int, int]:
    """(held at most while the loss is computed, held as its backward pass begins), activations of the layers below not counted."""
    wide = 8 if head.compute == 8 else 4  # logits are reduced in fp32, or fp64 for fp64
    rows = min(trained_tokens, chunk_rows(head.vocabulary))
    elements, following = rows * head.vocabulary, min(rows, trained_tokens - rows) * head.vocabulary
    states = trained_tokens * head.hidden * (head.stream + (head.compute if head.compute != head.stream else 0))
    weight = head.vocabulary * head.hidden
    if not head.exact:
        # logits of all positions, the cap's tanh and its product; of trained ones the logits and their wide log-softmax
        whole = head.vocabulary * (3 * head.compute * tokens + (head.compute + wide) * trained_tokens)
        return states + whole, states + whole + wide * elements
    if not head.linear:
        # chunks are recomputed in the backward pass, and those recomputed stay until it has passed the last (benchmarks/loss_memory.py)
        return states + 3 * wide * elements, states + wide * (head.vocabulary * trained_tokens + 4 * elements)
    d_hidden = trained_tokens * head.hidden * head.compute
    narrow = head.compute if head.compute != wide else 0
    made, used = narrow + wide, wide + narrow  # bytes of a logit while it is made, and while it is used
    several = following * made + elements * used if following else 0  # a chunk's names still hold it while the next is made
    copy = weight * head.compute if head.compute != head.weight else 0
    d_weight = weight * wide if head.trained else 0
    product = weight * head.compute if head.trained else 0  # of a chunk's gradient and its hidden states, before it is added
    forward = copy + d_weight + max(elements * made, several, elements * used + product)
    return states + d_hidden + forward, states + 2 * d_hidden + 2 * d_weight
