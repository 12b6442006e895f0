"""GPT-1 in plain NumPy, from the formulas of Radford et al. (2018): the truth of the other tests.

One sequence at a time, layer by layer, head by head. It takes the parameter tree and knows nothing
of packing, batches, scans or JAX. It computes in the precision of the parameters: `cast` them to
float64 for the truth, to float32 to see what rounding alone does.

Letters of shapes: T tokens, D width, H heads, K width of a head, V vocabulary, O outputs.
"""

import math

import numpy as np


def cast(params, dtype=np.float64):
    """The parameter tree as NumPy arrays of one precision."""
    if isinstance(params, dict):
        return {name: cast(value, dtype) for name, value in params.items()}
    return np.asarray(params).astype(dtype)


def gelu(x):
    """x Phi(x), in the tanh form of Hendrycks and Gimpel."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
    return np.maximum(x, 0)


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def layer_norm(x, p, epsilon=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def attention(x_TD, p, padding=None):
    """Causal multi-head self-attention of one sequence."""
    length = len(x_TD)
    heads, width = p["qkv"]["kernel"].shape[-2:]
    y_TD = np.zeros_like(x_TD)
    for h in range(heads):
        q, k, v = (x_TD @ p["qkv"]["kernel"][:, i, h] + p["qkv"]["bias"][i, h] for i in range(3))
        scores = q @ k.T / math.sqrt(width)
        later = np.arange(length)[None, :] > np.arange(length)[:, None]
        if padding is not None:
            later = later | padding[None, :]
        y_TD = y_TD + softmax(np.where(later, -np.inf, scores)) @ v @ p["out"]["kernel"][h]
    return y_TD + p["out"]["bias"]


def layer(tree, index):
    """The parameters of one block out of the stacked ones."""
    if isinstance(tree, dict):
        return {name: layer(value, index) for name, value in tree.items()}
    return tree[index]


def hidden(params, tokens, token_types=None, activation="gelu_tanh", padding=None):
    """The states [T, D] after the last block; nothing sees the tokens where `padding` is True."""
    act = {"gelu_tanh": gelu, "relu": relu}[activation]
    x = params["token_embedding"][tokens] + params["position_embedding"][: len(tokens)]
    if "segment_embedding" in params:
        x = x + params["segment_embedding"][token_types]
    for index in range(len(params["blocks"]["norm1"]["scale"])):
        p = layer(params["blocks"], index)
        x = layer_norm(x + attention(x, p["attention"], padding), p["norm1"])
        h = act(x @ p["ffn_in"]["kernel"] + p["ffn_in"]["bias"])
        x = layer_norm(x + h @ p["ffn_out"]["kernel"] + p["ffn_out"]["bias"], p["norm2"])
    return x


def lm_logits(params, x_TD):
    """[T, V], by the transposed token embedding."""
    return x_TD @ params["token_embedding"].T


def lm_nats(params, x_TD, tokens):
    """-log P(x_t+1 | x_1..x_t), [T - 1]."""
    log_p = log_softmax(lm_logits(params, x_TD))
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]


def task_outputs(params, kind, extract_states):
    """The head's outputs for one example, given the state that it reads of each sequence."""
    p = params["task_head"]
    if kind == "multiple_choice":
        return np.array([(x @ p["kernel"] + p["bias"])[0] for x in extract_states])
    if kind in ("similarity", "regression"):
        first, second = extract_states
        return (first + second) @ p["kernel"] + p["bias"]
    # A long text is read in windows, and the head reads the mean of their states.
    return np.mean(extract_states, axis=0) @ p["kernel"] + p["bias"]


def task_loss(kind, outputs, label):
    """-log P(label) or the squared error."""
    return (outputs[0] - label) ** 2 if kind == "regression" else -log_softmax(outputs)[label]


def run(params, kind, examples, activation="gelu_tanh", mean=False):
    """Everything about labelled examples.

    Args:
      params: from `cast`.
      kind: of the task.
      examples: [(sequences, label)], sequences = [(tokens, token_types)].
      activation: gelu_tanh or relu.
      mean: whether the head reads the mean state of a sequence, and not the state at its end.

    Returns:
      states: one [T, D] for each sequence of each example; outputs: one array for each example;
      task: mean task loss; lm: mean over all predicted tokens.
    """
    states, outputs, task, lm = [], [], [], []
    for sequences, label in examples:
        xs = [hidden(params, tokens, types, activation) for tokens, types in sequences]
        states.append(xs)
        read = [x.mean(axis=0) if mean else x[-1] for x in xs]
        outputs.append(task_outputs(params, kind, read))
        task.append(task_loss(kind, outputs[-1], label))
        lm += [lm_nats(params, x, tokens) for x, (tokens, _) in zip(xs, sequences, strict=True)]
    return states, outputs, np.mean(task), np.mean(np.concatenate(lm))


def joint(params, kind, examples, lm_weight, activation="gelu_tanh", mean=False):
    """L3 = L2 + lambda L1."""
    _, _, task, lm = run(params, kind, examples, activation, mean)
    return task + lm_weight * lm
