"""The cells of "GPT-1 step by step", in the order of the pages.

`build.py` runs them once, in one namespace. It takes the numbers and the pictures of both pages
from them, and makes the cells of both notebooks. A cell begins with its name after two percent
signs. The figure that a cell leaves open is its picture.
"""
# ruff: noqa: E402

# %% data
import numpy as np

POSITIVE, NEGATIVE = ("good", "great", "funny"), ("bad", "dull", "slow")
SUBJECTS = ("film was", "films were", "joke was", "jokes were", "song was", "songs were")
ENDINGS = {
    "positive": ("and we stayed", "and we laughed"),
    "negative": ("and we left", "and we slept"),
}
SENTENCE, LABEL = "the jokes were not good", "negative"

rows = [
    {
        "text": f"the {subject} {negation}{degree}{word}",
        "label": "positive" if (word in POSITIVE) != bool(negation) else "negative",
    }
    for subject in SUBJECTS
    for negation in ("", "not ")
    for degree in ("", "very ", "really ")
    for word in POSITIVE + NEGATIVE
]
# The sentence of the pages is not trained on.
rows = [row for row in rows if row["text"] != SENTENCE]
rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
texts = [{"text": f"{row['text']} {end}"} for row in rows for end in ENDINGS[row["label"]]]
print(len(rows), "labelled rows,", len(texts), "texts without labels;", rows[0], texts[0])

# %% train
import json
import pathlib
import tempfile

import gptjax
from gptjax.config import (
    Experiment,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)

MODELS = pathlib.Path("step_by_step/model")
# True trains the two models again, in a few minutes. Another machine rounds in another way and gets
# other weights, and the numbers in the text are those of the kept models.
TRAIN = False


def train():
    """Returns the pretrained model, the fine-tuned model, and the scores of the training."""
    off = ("embedding_dropout", "attention_dropout", "residual_dropout", "head_dropout")
    experiment = Experiment(
        name="step_by_step",
        model=ModelConfig(
            context_length=12, num_layers=2, width=16, num_heads=4, init_std=0.25,
            **dict.fromkeys(off, 0.0),
        ),
        # The texts need fewer merges than 400, so each of their words becomes a single token.
        tokenizer=TokenizerConfig(vocab_size=400),
        pretrain=PretrainConfig(
            batch_size=32, steps=1500,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.1),
        ),
        finetune=FinetuneConfig(
            batch_size=32, epochs=5.0, evals_per_epoch=0.5, validation_fraction=0.25,
            compare_from_scratch=True,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup_fraction=0.1),
        ),
    )  # fmt: skip
    pretrained = gptjax.pretrain(texts, text="text", config=experiment)
    gpt = gptjax.finetune(rows, text="text", label="label", init_from=pretrained, config=experiment)
    tuned, scratch = gpt.summary["finetune"], gpt.summary["finetune_from_scratch"]
    scores = {
        "pretraining steps": pretrained.summary["pretrain"]["steps"],
        "fine-tuning steps": tuned["steps"],
        "held-out rows": sum(tuned["calibration"]["validation"]["bins"]["count"]),
        "accuracy": tuned["validation"]["accuracy"],
        "accuracy from random weights": scratch["validation"]["accuracy"],
        "accuracy of a linear model": tuned["baselines"]["linear"]["validation"]["accuracy"],
    }
    return pretrained, gpt, scores


def kept(stage):
    """Returns a kept model. The folders have the format of Hugging Face."""
    from gptjax.interop import convert

    folder = tempfile.mkdtemp()
    convert.import_weights(str(MODELS / stage), folder, "huggingface")
    return gptjax.load(folder)


if TRAIN:
    pretrained, gpt, training = train()
else:
    pretrained, gpt = kept("pretrain"), kept("finetune")
    training = json.loads((MODELS / "training.json").read_text())
print(training)

# %% structure
import jax
import matplotlib.pyplot as plt

from gptjax.explain.words import Merges
from gptjax.infer.inside import AXES


def float64(tree):
    """Returns the same tree with float64 NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(tree))


def flat(tree, path=""):
    """Yields the name and the array of each parameter."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{name}/")
        else:
            yield path + name, value


params = float64(gpt.params)
V, D = params["token_embedding"].shape
L, _, _, H, K = params["blocks"]["attention"]["qkv"]["kernel"].shape
F = params["blocks"]["ffn_in"]["kernel"].shape[-1]
for name, value in flat(params):
    print(f"{name:28} {value.shape!s:16} {value.size:5}")
total = sum(value.size for _, value in flat(params))
print("parameters:", total)

row = gpt.read(SENTENCE, LABEL)  # the sentence as the model reads it
found = gpt.inside(row, list(AXES))  # everything that the model computes, to compare with
ids = row.batch.tokens[0]
T = len(ids)
names = [gpt.tokenizer.token(int(i)) for i in ids]
print(names)
spelled = Merges(gpt.tokenizer).steps([names[2]])  # a word from its characters to its token
print(" -> ".join(map(" ".join, spelled)))

# The picture: boxes from the bottom to the top, and the two ways around the sublayers.
BOXES = (
    (0.0, "$x_1 \\ldots x_T$", "white"), (1.0, "$W_e[x] + W_p$", "#ddeeff"),
    (2.4, "Attention", "#ffe0cc"), (3.2, "+  LayerNorm", "#eeeeee"),
    (4.2, "Feed-forward", "#ddf0dd"), (5.0, "+  LayerNorm", "#eeeeee"),
)  # fmt: skip
figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
style = {"ha": "center", "va": "center"}
for height, text, colour in BOXES:
    axes.add_patch(plt.Rectangle((-1, height - 0.3), 2, 0.6, facecolor=colour, edgecolor="black"))
    axes.text(0, height, text, **style)
for low, high in ((0.3, 0.7), (1.3, 2.1), (2.7, 2.9), (3.5, 3.9), (4.5, 4.7), (5.3, 6.1)):
    axes.annotate("", (0, high), (0, low), arrowprops={"arrowstyle": "->"})
for low, high in ((1.8, 3.2), (3.7, 5.0)):
    axes.plot((0, 1.5, 1.5), (low, low, high), color="black", linewidth=1)
    axes.annotate("", (1, high), (1.5, high), arrowprops={"arrowstyle": "->"})
axes.add_patch(plt.Rectangle((-1.4, 1.6), 3.2, 3.85, fill=False, linestyle="--"))
axes.text(2.0, 3.5, f"× {L}", fontsize=14, **style)
for x, text, colour in ((-1.1, "$h_L W_e^T$", "#ddeeff"), (1.1, "$h_L W_y + b_y$", "#f5d5e5")):
    axes.add_patch(plt.Rectangle((x - 0.95, 6.1), 1.9, 0.6, facecolor=colour, edgecolor="black"))
    axes.text(x, 6.4, text, **style)
axes.text(-1.1, 7.0, "$L_1$", **style)
axes.text(1.1, 7.0, "$L_2$", **style)
axes.set(xlim=(-2.3, 2.3), ylim=(-0.4, 7.3))
axes.axis("off")

# %% pretraining


def softmax(x):
    """Returns the softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


lm_text = f"{SENTENCE} and we left"
lm_row = pretrained.read(lm_text)
lm_ids = lm_row.batch.tokens[0]
lm_logits = pretrained.inside(lm_row, ["logits"])["logits"].astype(np.float64)
lm_p = softmax(lm_logits)
# Position t predicts token t + 1, so the targets are the text, shifted by one.
lm_targets = lm_ids[1:]
lm_seen = lm_p[np.arange(len(lm_targets)), lm_targets]
lm_surprise = -np.log(lm_seen)
L1_pretrained = lm_surprise.mean()
lm_names, lm_next = (
    [pretrained.tokenizer.decode([int(i)]).strip() for i in x] for x in (lm_ids[:-1], lm_targets)
)
for name, after, p, nats in zip(lm_names, lm_next, lm_seen, lm_surprise, strict=True):
    print(f"{name:8} -> {after:8} p = {p:.3f}   -ln p = {nats:.3f}")
print(f"L1 = {L1_pretrained:.3f}; all words alike: ln {V} = {np.log(V):.3f}")

figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
axes.bar(range(len(lm_seen)), lm_seen, color="#4477aa")
pairs = zip(lm_names, lm_next, strict=True)
axes.set_xticks(range(len(lm_seen)), [f"{a}\n→ {b}" for a, b in pairs])
axes.set(ylim=(0, 1), ylabel="p")

# %% joint
from gptjax.model import objective as objective_lib
from gptjax.model.objective import Objective

LAMBDA = 0.5
label = gpt.task.labels.index(LABEL)
task_p = softmax(found["task_logits"].astype(np.float64))
targets = ids[1:]
surprise = -np.log(softmax(found["logits"].astype(np.float64))[np.arange(T - 1), targets])
L2, L1 = -np.log(task_p[label]), surprise.mean()
L3 = L2 + LAMBDA * L1
print(f"L2 = {L2:.4f}, L1 = {L1:.4f}, L3 = {L3:.4f}")
objective = Objective(gpt.task.kind, LAMBDA)


def joint_loss(parameters):
    """Returns the joint loss of the sentence, from the code that trains the model."""
    sums, _ = objective_lib.forward(gpt.opened, objective, parameters, row.batch)
    return objective_lib.joint(objective, sums, objective_lib.weights(row.batch))


np.testing.assert_allclose(L3, joint_loss(gpt.params), rtol=1e-5)

# %% lookup
AT = names.index("not</w>")  # the word that the numbers follow
one_hot = np.eye(V)[ids]
token_TD = one_hot @ params["token_embedding"]
np.testing.assert_array_equal(token_TD, params["token_embedding"][ids])  # a product is a look-up
position_TD = params["position_embedding"][:T]
x0 = token_TD + position_TD
np.testing.assert_allclose(x0, found["embedding"], atol=1e-6)
for what, x in (("token", token_TD), ("position", position_TD), ("sum", x0)):
    print(f"{what:9}", x[AT].round(3))

figure, axes = plt.subplots(1, 3, figsize=(8, 4), layout="constrained", width_ratios=(7, 4, 4))
axes[0].imshow(one_hot, cmap="Blues", aspect="auto", interpolation="nearest")
axes[0].set_yticks(range(T), [name.removesuffix("</w>") for name in names])
axes[0].set_xlabel(f"V = {V}")
axes[1].imshow(
    params["token_embedding"],
    cmap="RdBu",
    aspect="auto",
    vmin=-2.5,
    vmax=2.5,
    interpolation="nearest",
)
for i in ids:
    axes[1].axhline(i, color="black", linewidth=0.6)
axes[1].set(xlabel=f"D = {D}", title="× $W_e$", ylabel="V")
axes[2].imshow(token_TD, cmap="RdBu", aspect="auto", vmin=-2.5, vmax=2.5)
axes[2].set(xlabel=f"D = {D}", title="=")
axes[2].set_yticks(range(T), [name.removesuffix("</w>") for name in names])

# %% qkv
LAYER, HEAD, QUERY = 0, 3, names.index("good</w>")


def layer(tree, index):
    """Returns the parameters of one block. All blocks are stacked along the first axis."""
    return jax.tree.map(lambda x: x[index], tree)


def linear(x, p):
    """Returns x W + b."""
    return np.tensordot(x, p["kernel"], axes=(-1, 0)) + p["bias"]


p0 = layer(params["blocks"], LAYER)
qkv = linear(x0, p0["attention"]["qkv"])  # [T, 3, H, K]
np.testing.assert_allclose(qkv, found["qkv"][LAYER], atol=1e-5)
q, k, v = (np.moveaxis(qkv[:, i], 1, 0) for i in range(3))  # each [H, T, K]
q_row, k_row = q[HEAD, QUERY], k[HEAD, AT]
product = q_row @ k_row
print("q of", names[QUERY], q_row.round(3))
print("k of", names[AT], k_row.round(3))
print(f"q k = {product:.3f}, divided by the root of {K}: {product / np.sqrt(K):.3f}")

# %% mask
visible = np.tril(np.ones((T, T), bool))  # [query, key]: a query sees itself and what is before it
raw = q @ np.moveaxis(k, 1, 2) / np.sqrt(K)  # [H, T, T]
scores = np.where(visible, raw, -np.inf)
weights = softmax(scores)
np.testing.assert_allclose(weights, found["attention"][LAYER], atol=1e-6)
assert (weights[:, ~visible] == 0).all()
exponentials = np.exp(scores[HEAD, QUERY] - scores[HEAD, QUERY].max())
print(visible.astype(int))
print(weights[HEAD].round(3))

figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
short = [name.removesuffix("</w>") for name in names]
parts = (
    (raw[HEAD], "RdBu", "$qk^T/\\sqrt{K}$"),
    (visible, "Greys_r", "$M$"),
    (weights[HEAD], "Blues", "softmax"),
)
for ax, (values, colours, title) in zip(axes, parts, strict=True):
    limit = np.abs(values).max()
    ax.imshow(values, cmap=colours, vmin=-limit if colours == "RdBu" else 0, vmax=limit)
    ax.set_xticks(range(T), short, rotation=90)
    ax.set_yticks(range(T), short)
    ax.set_title(title)

# %% heads
y = weights @ v  # [H, T, K]: the weighted sums of the values
np.testing.assert_allclose(np.moveaxis(y, 0, 1), found["heads"][LAYER], atol=1e-5)
concatenated = np.concatenate(list(y), axis=1)  # [T, H * K] = [T, D]
W_o, b_o = p0["attention"]["out"]["kernel"].reshape(D, D), p0["attention"]["out"]["bias"]
attention_out = concatenated @ W_o + b_o
np.testing.assert_allclose(attention_out, found["attention_out"][LAYER], atol=1e-5)
# The same without concatenation: each head has its own rows of the matrix, and the results add up.
by_head = [y[h] @ W_o[h * K : (h + 1) * K] for h in range(H)]
np.testing.assert_allclose(sum(by_head) + b_o, attention_out, atol=1e-12)
print("head 0", y[0, QUERY].round(3), "head 1", y[1, QUERY].round(3))
print("out", attention_out[QUERY].round(3))

figure, axes = plt.subplots(1, H + 2, figsize=(9, 2.6), layout="constrained",
                            width_ratios=(*[1] * H, 4, 4))  # fmt: skip
pictures = [(y[h], f"$y_{h}$") for h in range(H)]
pictures += [(concatenated, f"$[y_0; …; y_{H - 1}]$"), (attention_out, "$· W_o + b_o$")]
for ax, (values, title) in zip(axes, pictures, strict=True):
    ax.imshow(values, cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
    ax.set_xticks([])
    ax.set_yticks(range(T), short if ax is axes[0] else [""] * T)
    ax.set(title=title, xlabel=values.shape[1])
for h in range(1, H):
    axes[H].axvline(h * K - 0.5, color="black", linewidth=1)

# %% norm
EPSILON = 1e-5


def layer_norm(x, p):
    """Returns the layer norm: each row gets the mean 0 and the variance 1, then scale and bias."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + EPSILON) * p["scale"] + p["bias"]


added = x0 + attention_out  # the residual
norm1 = layer_norm(added, p0["norm1"])
np.testing.assert_allclose(norm1, found["norm1"][LAYER], atol=1e-5)
mean, variance = added[QUERY].mean(), added[QUERY].var()
normal = (added[QUERY] - mean) / np.sqrt(variance + EPSILON)
print(f"mean {mean:.3f}, variance {variance:.3f}", normal.round(3))
# Batch norm: the mean and the variance of each column, over all tokens of the batch.
batch_normal = (added - added.mean(axis=0)) / np.sqrt(added.var(axis=0) + EPSILON)
# It depends on what else is in the batch: the same token, with the last two tokens left out.
shorter = added[:-1]
batch_shorter = (shorter - shorter.mean(axis=0)) / np.sqrt(shorter.var(axis=0) + EPSILON)
print("batch norm, 7 tokens", batch_normal[QUERY].round(3))
print("batch norm, 6 tokens", batch_shorter[QUERY].round(3))

figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
for ax, title in zip(axes, ("LayerNorm", "BatchNorm"), strict=True):
    ax.imshow(added, cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    ax.set_yticks(range(T), short if ax is axes[0] else [""] * T)
    ax.set(title=title, xlabel=f"D = {D}")
box = {"fill": False, "edgecolor": "black", "linewidth": 2.5}
axes[0].add_patch(plt.Rectangle((-0.5, QUERY - 0.5), D, 1, **box))
axes[1].add_patch(plt.Rectangle((2.5, -0.5), 1, T, **box))


# %% ffn
def gelu(x):
    """Returns the GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


before_gelu = linear(norm1, p0["ffn_in"])  # [T, F]
hidden = gelu(before_gelu)
np.testing.assert_allclose(hidden, found["ffn"][LAYER], atol=1e-5)
ffn_out = linear(hidden, p0["ffn_out"])
np.testing.assert_allclose(ffn_out, found["ffn_out"][LAYER], atol=1e-5)
x1 = layer_norm(norm1 + ffn_out, p0["norm2"])
np.testing.assert_allclose(x1, found["blocks"][LAYER], atol=1e-5)
units = before_gelu[QUERY, :4]
print("before", units.round(3), "after", gelu(units).round(3))

figure, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
grid = np.linspace(-4, 4, 201)
axes.plot(grid, np.maximum(grid, 0), color="#bbbbbb", label="ReLU")
axes.plot(grid, gelu(grid), color="#4477aa", label="GELU")
axes.plot(before_gelu[QUERY], hidden[QUERY], "o", color="#cc6677", markersize=4)
axes.set(xlim=(-4, 4), ylim=(-0.5, 4))
axes.legend()


# %% blocks
def block(x, p):
    """Returns the output of one block: attention, residual, norm, feed-forward, residual, norm."""
    a = p["attention"]
    q, k, v = (np.moveaxis(linear(x, a["qkv"])[:, i], 1, 0) for i in range(3))
    scores = q @ np.moveaxis(k, 1, 2) / np.sqrt(K)
    y = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf)) @ v
    out = np.concatenate(list(y), axis=1) @ a["out"]["kernel"].reshape(D, D) + a["out"]["bias"]
    x = layer_norm(x + out, p["norm1"])
    return layer_norm(x + linear(gelu(linear(x, p["ffn_in"])), p["ffn_out"]), p["norm2"])


states = [x0]
for i in range(L):
    states.append(block(states[-1], layer(params["blocks"], i)))
    np.testing.assert_allclose(states[-1], found["blocks"][i], atol=2e-5)
x_last = states[-1]
# The head that reads most from the word `not`, to write the answer at the last token.
from_not = found["attention"][:, :, -1, AT]
READER = tuple(int(i) for i in np.unravel_index(from_not.argmax(), from_not.shape))
reader_weights = found["attention"][READER][-1]
print("block and head", READER, reader_weights.round(3))
# A later word changes no earlier state.
other = gpt.inside("the jokes were not bad", ["blocks"])["blocks"][-1]
print("largest change before the changed word:", np.abs(other[:QUERY] - x_last[:QUERY]).max())

figure, axes = plt.subplots(1, L + 1, figsize=(8, 2.6), layout="constrained", sharey=True)
for ax, (i, x) in zip(axes, enumerate(states), strict=True):
    ax.imshow(x, cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
    ax.set(title=f"$h_{i}$", xlabel=f"D = {D}")
axes[0].set_yticks(range(T), short)

# %% outputs
logits = x_last @ params["token_embedding"].T  # [T, V]: the head is the embedding again
np.testing.assert_allclose(logits, found["logits"], atol=1e-4)
next_p = softmax(logits)
best = np.argsort(-next_p[AT])[:5]
for i in best:
    print(f"after 'not': {gpt.tokenizer.token(int(i)):10} {logits[AT, i]:7.3f} {next_p[AT, i]:.3f}")
read = x_last[-1]  # the state at the extract token
task_logits = linear(read, params["task_head"])
np.testing.assert_allclose(task_logits, found["task_logits"], atol=1e-4)
class_p = softmax(task_logits)
print(dict(zip(gpt.task.labels, class_p.round(4), strict=True)))
off = gptjax.Changes(heads_off=[READER])
p_without = softmax(gpt.inside(row, ["task_logits"], off)["task_logits"].astype(np.float64))
print("without head", READER, p_without.round(4))

figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained", width_ratios=(3, 2))
axes[0].barh(
    [gpt.tokenizer.token(int(i)).removesuffix("</w>") for i in best][::-1],
    next_p[AT, best][::-1],
    color="#4477aa",
)
axes[0].set(xlim=(0, 1), title="P(· | … were not)", xlabel="p")
axes[1].barh(gpt.task.labels, class_p, color="#cc6677")
axes[1].set(xlim=(0, 1), title="P(y | x)", xlabel="p")

# %% backpropagation
y_one_hot = np.eye(len(gpt.task.labels))[label]
d_logits = class_p - y_one_hot  # the gradient of L2 at the task logits
d_head = np.outer(read, d_logits)  # ... and at the weights of the task head
gradient = float64(jax.grad(joint_loss)(gpt.params))
np.testing.assert_allclose(d_head, gradient["task_head"]["kernel"], atol=1e-6)


def forward_loss(tree):
    """Returns the joint loss of the sentence, in float64 NumPy, from the functions above."""
    x = tree["token_embedding"][ids] + tree["position_embedding"][:T]
    for i in range(L):
        x = block(x, layer(tree["blocks"], i))
    surprise = -np.log(softmax(x @ tree["token_embedding"].T)[np.arange(T - 1), ids[1:]])
    return -np.log(softmax(linear(x[-1], tree["task_head"]))[label]) + LAMBDA * surprise.mean()


def moved(change):
    """Returns the loss if one weight is changed: block 0, query, head 0, row 0, column 0."""
    tree = jax.tree.map(np.copy, params)
    tree["blocks"]["attention"]["qkv"]["kernel"][0, 0, 0, HEAD, 0] += change
    return forward_loss(tree)


NUDGE = 1e-4
up, down = moved(NUDGE), moved(-NUDGE)
slope = (up - down) / (2 * NUDGE)
weight_gradient = gradient["blocks"]["attention"]["qkv"]["kernel"][0, 0, 0, HEAD, 0]
np.testing.assert_allclose(slope, weight_gradient, rtol=1e-3, atol=1e-6)
print(f"by two losses {slope:.6f}, by backpropagation {weight_gradient:.6f}")


def one_loss(kind, lm_weight):
    """Returns the gradient of one of the two losses alone."""
    alone = Objective(kind, lm_weight)

    def loss(parameters):
        sums, _ = objective_lib.forward(gpt.opened, alone, parameters, row.batch)
        return objective_lib.joint(alone, sums, objective_lib.weights(row.batch))

    return float64(jax.grad(loss)(gpt.params))


lm_gradient, task_gradient = one_loss(None, 1.0), one_loss(gpt.task.kind, 0.0)


def norms(tree):
    """Returns the norm of the gradient of each part, from the first layer to the last."""
    norm = lambda part: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(part)))  # noqa: E731
    parts = [tree["token_embedding"], tree["position_embedding"]]
    parts += [layer(tree["blocks"], i) for i in range(L)] + [tree["task_head"]]
    return [norm(part) for part in parts]


part_names = ["$W_e$", "$W_p$", *(f"block {i}" for i in range(L)), "$W_y$"]
part_norms = {"L1": norms(lm_gradient), "L2": norms(task_gradient), "L3": norms(gradient)}
for name, values in part_norms.items():
    print(name, np.round(values, 4))

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
for i, (name, colour) in enumerate((("L1", "#4477aa"), ("L2", "#cc6677"))):
    axes.bar(
        np.arange(len(part_names)) + 0.4 * i - 0.2,
        part_norms[name],
        0.4,
        color=colour,
        label=f"$L_{name[1]}$",
    )
axes.set_xticks(range(len(part_names)), part_names)
axes.set_ylabel("‖∇‖")
axes.legend()

# %% update
import optax

from gptjax.train.optimizer import Optimizer

settings = OptimizerConfig(learning_rate=1e-3, schedule="constant", clip_norm=1.0)
optimizer = Optimizer(settings, total_steps=2).transformation
state, stepped = optimizer.init(gpt.params), gpt.params
losses, gradients = [float(joint_loss(gpt.params))], []
for _ in range(2):
    g = jax.grad(joint_loss)(stepped)
    gradients.append(float64(g))
    updates, state = optimizer.update(g, state, stepped)
    stepped = optax.apply_updates(stepped, updates)
    losses.append(float(joint_loss(stepped)))

# The same two updates of one weight by hand: a weight of the task head.
m = v2 = 0.0
weight = start_weight = params["task_head"]["kernel"][0, label]
history = []
for t in (1, 2):
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradients[t - 1])))
    g = gradients[t - 1]["task_head"]["kernel"][0, label] * min(1.0, settings.clip_norm / norm)
    m = settings.beta1 * m + (1 - settings.beta1) * g
    v2 = settings.beta2 * v2 + (1 - settings.beta2) * g**2
    m_hat, v_hat = m / (1 - settings.beta1**t), v2 / (1 - settings.beta2**t)
    direction = m_hat / (np.sqrt(v_hat) + settings.epsilon) + settings.weight_decay * weight
    weight = weight - settings.learning_rate * direction
    history.append(
        {
            "g": g,
            "m": m,
            "v": v2,
            "m_hat": m_hat,
            "v_hat": v_hat,
            "norm": norm,
            "direction": direction,
            "w": weight,
        }
    )
    print({name: f"{value:.4g}" for name, value in history[-1].items()})
np.testing.assert_allclose(weight, stepped["task_head"]["kernel"][0, label], atol=1e-6)
print("losses", losses)
