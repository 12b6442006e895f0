"""Each property of the named recipes, against a float64 reference or a closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import runs
import small

from gptjax.config import recipes, validation
from gptjax.config.schema import Experiment, FinetuneConfig, PretrainConfig, TaskSpec
from gptjax.data import loader, tasks
from gptjax.data.packing import Packer
from gptjax.data.tables.labelled import LabelledTable
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model import objective as objective_lib
from gptjax.model.gpt import GPT
from gptjax.train import stages

KEY = jax.random.key(7)


def sequences(data, i):
    """Returns tokens (without padding) and token types of the sequences of example i."""
    found = []
    for c in range(data.num_candidates):
        n = i * data.num_candidates + c
        tokens = data.tokens[n]
        types = (np.arange(len(tokens)) >= data.second_start[n]).astype(int)
        if data.padding_start is not None:
            types[data.padding_start[n] :] = 2
        found.append((tokens, types))
    return found


# ---- original ----


def original(kind="multiple_choice", **changes):
    """Returns a model of the recipe, random parameters, and a packed batch of examples."""
    spec, data = small.examples(kind, count=5)
    model = gpt.make_model(small.config(one_matrix=True, **changes), spec)
    packer = Packer(data.lengths, 5, 96, sequence_means=True)
    batch, index = packer.pack(data, np.arange(5))
    return spec, data, model, small.params(model), batch, index


def original_loss(params, kind, data, lm_weight):
    """Returns the authors' loss in float64: one matrix in the softmax, and means of means."""
    rows = np.concatenate([params["token_embedding"], params["position_embedding"]])
    task, lm = [], []
    for i in range(len(data)):
        states = []
        for tokens, types in sequences(data, i):
            x = reference.hidden(params, tokens, types)
            log_p = reference.log_softmax(x @ rows.T)
            lm.append(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
            states.append(x[-1])
        outputs = reference.task_outputs(params, kind, states)
        task.append(reference.task_loss(kind, outputs, data.labels[i]))
    return np.mean(task) + lm_weight * np.mean(lm)


@pytest.mark.parametrize("kind", ["multiple_choice", "similarity"])
def test_original_s_loss_and_gradients_are_those_of_one_matrix_and_means_of_means(kind):
    _, data, model, params, batch, _ = original(kind)
    got = jax.device_get(small.measure(model, objective_lib.Objective(kind, 0.5))(params, batch))
    exact = reference.cast(params)
    assert got["loss"] == pytest.approx(original_loss(exact, kind, data, 0.5), rel=1e-6)
    rng = np.random.default_rng(0)
    for name in ("token_embedding", "position_embedding"):
        d = rng.normal(size=exact[name].shape)
        ends = [
            original_loss({**exact, name: exact[name] + sign * 1e-5 * d}, kind, data, 0.5)
            for sign in (1, -1)
        ]
        gradient = got["gradients"][name].astype(np.float64)
        slope = (ends[0] - ends[1]) / 2e-5
        assert (gradient * d).sum() == pytest.approx(slope, abs=2e-5 * np.linalg.norm(gradient))


def test_original_drops_the_matrix_once_for_the_embedding_and_the_lm_head():
    """A model whose parameters are the matrix after dropout has the same losses without dropout."""
    kind = "multiple_choice"
    _, _, model, params, batch, _ = original(kind, embedding_dropout=0.4)
    head = gpt.run(model, params, False, method="lm_projection", key=KEY)
    assert head.bias_V is None
    rows = head.table_VD
    whole = np.concatenate([params["token_embedding"], params["position_embedding"]])
    ratio = np.asarray(rows) / whole
    assert set(np.unique(np.round(ratio, 4))) == {0.0, np.float32(1.6667)}
    size = model.config.vocab_size
    for part in (ratio[:size], ratio[size:]):
        assert 0.3 < (part == 0).mean() < 0.5
    dropped = {**params, "token_embedding": rows[:size], "position_embedding": rows[size:]}
    objective = objective_lib.Objective(kind, 0.5)
    with_key, _ = objective_lib.forward(model, objective, params, batch, KEY)
    without, _ = objective_lib.forward(model, objective, dropped, batch)
    small.assert_trees_close(with_key, without, 1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_the_candidates_of_an_example_share_one_mask(shared):
    _, _, model, params, batch, _ = original(head_dropout=0.5, head_dropout_shared=shared)
    alike = jnp.ones((*batch.tokens.shape, model.config.width))
    rows = (alike, batch.segment_ids, batch.extract)
    logits = np.asarray(gpt.run(model, params, *rows, False, method="task_logits", key=KEY))
    assert (np.ptp(logits, axis=2).max() < 1e-5) == shared
    assert np.ptp(logits[:, :, 0]) > 0, "examples must not share it"


def test_a_sequence_s_lm_weights_add_up_to_one():
    _, data, _, _, batch, _ = original()
    sums = [
        batch.lm_weights[row][batch.segment_ids[row] == segment].sum()
        for row in range(len(batch.tokens))
        for segment in range(1, batch.segment_ids[row].max() + 1)
    ]
    assert len(sums) == len(data.tokens)
    np.testing.assert_allclose(sums, 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["entailment", "similarity", "multiple_choice"])
def test_original_cuts_both_texts_to_half_a_context_less_two(kind):
    choices = ("pair", "pair") if kind == "multiple_choice" else ()
    pair = "" if choices else "pair"
    spec = TaskSpec(kind, "text", pair, choices, labels=("0", "1"), cut="half")
    tokenizer = small.small_tokenizer()
    long, short = "cat " * 40, "dogs"
    rows = {"text": [long, short, long], "pair": [short, long, long]}
    data = tasks.encode(spec, LabelledTable(rows, "here"), tokenizer, 20, labelled=False)
    n = len(tokenizer.encode(short))
    assert n < 8, "the short text must be whole"
    per_example = data.num_candidates
    lengths = [len(data.tokens[i * per_example]) - 3 for i in range(3)]
    assert lengths == [8 + n, n + 8, 8 + 8]
    assert data.cut == 3
    for tokens in data.tokens:
        assert tokens[0] == tokenizer.start_id
        assert tokens[-1] == tokenizer.extract_id
        assert (tokens == tokenizer.delimiter_id).sum() == 1


def test_original_drops_the_end_of_each_epoch_and_shuffles_anew():
    data = small.examples("classification", count=10)[1]
    size, epochs = 4, 3
    packer = Packer(data.lengths, size, 0)
    whole = loader.WholeEpochBatches(data, packer, size, seed=3)
    orders = []
    for epoch in range(epochs):
        seen = np.concatenate([whole.chosen(epoch * 2 + i) for i in range(2)])
        assert len(set(seen.tolist())) == 8, "an example is visited twice in an epoch"
        orders.append(tuple(seen))
    assert len(set(orders)) == epochs
    config = FinetuneConfig(batch_size=size, epochs=epochs, drop_last=True)
    assert stages._steps_per_epoch(config, 10) == 2
    with pytest.raises(UserError, match="batch_size`=4"):
        stages._steps_per_epoch(config, 3)


# ---- tutorial ----


def tutorial(count=6):
    """Returns a model of the recipe with a flattened head, and labelled pairs of texts."""
    tokenizer = small.small_tokenizer()
    rows = {
        "text": small.texts(count, 1), "pair": small.texts(count, 2),
        "label": [i % 2 for i in range(count)],
    }  # fmt: skip
    spec = tasks.find_labels(TaskSpec("entailment", "text", "pair"), LabelledTable(rows, "rows"))
    length = tasks.padded_length(spec, LabelledTable(rows, "rows"), tokenizer, 32)
    spec = dataclasses.replace(spec, flatten=length)
    data = tasks.encode(spec, LabelledTable(rows, "rows"), tokenizer, 32)
    changes = {"segment_types": 3, "activation": "relu", "tied": False}
    model = gpt.make_model(small.config(**changes), spec)
    return tokenizer, rows, spec, data, model, small.params(model)


def tutorial_reference(params, data, lm_weight, task_weight):
    """Returns the logits of each example, and the joint loss, in float64."""
    logits, task, lm = [], [], []
    for i in range(len(data)):
        [(tokens, types)] = sequences(data, i)
        real = int((types != 2).sum())
        x = reference.hidden(params, tokens, types, "relu", padding=types == 2)
        head = params["task_head"]
        logits.append(np.einsum("td,tdo->o", x, head["kernel"]) + head["bias"])
        task.append(-reference.log_softmax(logits[-1])[data.labels[i]])
        scores = x @ params["lm_head"]["kernel"].T + params["lm_head"]["bias"]
        log_p = reference.log_softmax(scores)
        lm += (-log_p[np.arange(real - 1), tokens[1:real]]).tolist()
    return np.array(logits), lm_weight * np.mean(lm) + task_weight * np.mean(task)


def test_the_tutorial_s_sequences_are_padded_to_the_longest_pair():
    tokenizer, rows, spec, data, _, _ = tutorial()
    assert {len(tokens) for tokens in data.tokens} == {spec.flatten}
    assert data.padding_start.max() == spec.flatten, "no pair is the longest"
    for i, tokens in enumerate(data.tokens):
        first, second = tokenizer.encode(rows["text"][i]), tokenizer.encode(rows["pair"][i])
        end = [tokenizer.delimiter_id]
        expected = [tokenizer.start_id, *first, *end, *second, *end]
        expected += [tokenizer.padding_id] * (spec.flatten - len(expected))
        assert tokens.tolist() == expected


def test_the_tutorial_s_joint_loss_and_flattened_head_equal_float64():
    _, _, spec, data, model, params = tutorial()
    batch, index = small.packed(data)
    assert (batch.token_types == 2).any()
    assert (index >= 0).sum(axis=1).max() > 1, "nothing is packed"
    objective = objective_lib.Objective("entailment", 1.0, 0.2)
    got = jax.device_get(small.measure(model, objective)(params, batch))
    exact = reference.cast(params)
    logits, loss = tutorial_reference(exact, data, 1.0, 0.2)
    assert params["task_head"]["kernel"].shape == (spec.flatten, model.config.width, 2)
    ours = got["task_logits"][index >= 0][np.argsort(index[index >= 0])]
    assert np.abs(ours - logits).max() < 1e-6 * np.abs(logits).max()
    assert got["loss"] == pytest.approx(loss, rel=1e-6)
    leaves, tree = jax.tree.flatten(exact)
    gradients, rng = jax.tree.leaves(got["gradients"]), np.random.default_rng(1)
    whole = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients))
    for i, gradient in enumerate(gradients):
        d = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [*leaves[:i], leaves[i] + sign * 1e-5 * d, *leaves[i + 1 :]]
            ends.append(tutorial_reference(jax.tree.unflatten(tree, moved), data, 1.0, 0.2)[1])
        bound = 3e-5 * np.linalg.norm(gradient) + 1e-6 * whole
        assert abs((gradient * d).sum() - (ends[0] - ends[1]) / 2e-5) < bound


def test_what_the_padding_of_one_pair_holds_reaches_no_other_token():
    """The head reads the states of padding, but no token's state depends on padding before it."""
    _, _, _, data, model, params = tutorial()
    batch, _ = small.packed(data)
    padding = batch.token_types == 2

    def states(tokens):
        return np.asarray(gpt.run(
            model, params, tokens, batch.segment_ids, batch.positions, batch.token_types,
            method="hidden",
        ))  # fmt: skip

    before = states(batch.tokens)
    after = states(np.where(padding, 5, batch.tokens))
    np.testing.assert_array_equal(before[~padding], after[~padding])
    assert np.abs(before[padding] - after[padding]).max() > 1e-3


# ---- all ----


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_valid_experiment(name):
    experiment = Experiment(
        pretrain=PretrainConfig(train_files="a", steps=5000),
        finetune=FinetuneConfig(train_file="b", text_pair="c", task="entailment"),
    )
    changed = validation.validate(recipes.apply(experiment, name))
    assert recipes.apply(Experiment(), name).finetune is None
    for part, fields in recipes.RECIPES[name].items():
        for field, value in fields.items():
            found = getattr(getattr(changed, part), field)
            if isinstance(value, dict):
                assert {each: getattr(found, each) for each in value} == value
            else:
                assert found == value


def test_paper_is_what_stands_in_the_configuration():
    assert recipes.apply(Experiment(), "paper") == Experiment()


def test_an_unknown_recipe_is_named():
    assert (
        "did you mean 'original'?"
        in runs.main("--config=experiments/gpt1_finetune.py:orginal").error
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["original", "modern"])
def test_a_recipe_fine_tunes_pretrained_weights_and_predicts(recipe, tmp_path):
    tiny = [flag for flag in runs.TINY if "tokenizer" not in flag]
    trained = runs.main(
        f"--config=experiments/gpt1_finetune.py:{recipe}", *tiny, *runs.files().finetune,
        "--config.finetune.dataset=", f"--config.init_from={runs.trained()}/checkpoints/pretrain",
        f"--workdir={tmp_path}/w",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    floor = runs.summary(f"{tmp_path}/w")["finetune"]["floor"]["test"]["accuracy"]
    assert runs.summary(f"{tmp_path}/w")["finetune"]["test"]["accuracy"] > floor
    predicted = runs.main(
        "--mode=predict", f"--checkpoint={tmp_path}/w", f"--input={runs.files().test}",
        f"--output={tmp_path}/out.csv",
    )  # fmt: skip
    assert predicted.code == 0, predicted.err


@pytest.mark.slow
def test_the_tutorial_trains_predicts_and_generates(tmp_path):
    rows = [{"a": row["text"], "b": row["text"], "label": row["label"]} for row in runs.rows(60)]
    path = runs.write(tmp_path / "pairs.csv", rows)
    trained = runs.main(
        "--config=experiments/tutorial.py", *runs.TINY, f"--config.finetune.train_file={path}",
        "--config.finetune.text=a", "--config.finetune.text_pair=b",
        "--config.finetune.label=label", "--config.finetune.metrics=",
        "--config.finetune.batch_size=8", "--config.finetune.optimizer.learning_rate=0.01",
        f"--workdir={tmp_path}/w",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "0.2 * task + 1 * LM" in trained.out
    summary = runs.summary(f"{tmp_path}/w")["finetune"]["validation"]
    total = summary["lm_loss"] + 0.2 * summary["task_loss"]
    assert summary["loss"] == pytest.approx(total)
    new = [{"a": "the cat " * 9, "b": "a"}, {"a": "a tree", "b": "the house"}]
    longer = runs.write(tmp_path / "new.csv", new)
    predicted = runs.main(
        "--mode=predict", f"--checkpoint={tmp_path}/w", f"--input={longer}",
        f"--output={tmp_path}/out.csv",
    )  # fmt: skip
    assert predicted.code == 0, predicted.err
    assert "1 cut to fit" in predicted.out
    made = runs.main("--mode=generate", f"--checkpoint={tmp_path}/w", "--prompt=the cat")
    assert made.code == 0, made.err
    refused = runs.main(
        "--mode=export", f"--input={tmp_path}/w", f"--output={tmp_path}/x", "--format=huggingface"
    )
    assert "no place for" in refused.error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.segment_types=2"], "needs --config.model.segment_types=3"),
        (["--config.finetune.task=similarity"], "head=flatten: reads one sequence"),
        (["--config.model.one_matrix=true"], "--config.model.one_matrix: its rows"),
        (["--config.finetune.head=flat"], "did you mean 'flatten'?"),
        (
            ["--config.init_from=TRAINED"],
            "needs --config.model.segment_types=3",
        ),
        (["--config.finetune.lm_mean=tokens"], "--config.finetune.lm_mean=tokens"),
        (["--config.finetune.cut=third"], "--config.finetune.cut=third"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, words):
    flags = [flag.replace("TRAINED", f"{runs.trained()}/checkpoints/pretrain") for flag in flags]
    result = runs.main(
        "--config=experiments/tutorial.py", f"--config.finetune.train_file={runs.files().train}",
        "--config.finetune.text=text", "--config.finetune.text_pair=text",
        "--config.finetune.label=label", *flags,
    )  # fmt: skip
    assert words in result.error


def test_an_untied_head_has_its_own_logits():
    model = GPT(small.config(tied=False))
    params = small.params(model)
    x = np.random.default_rng(0).normal(size=(1, 3, model.config.width)).astype(np.float32)
    logits = gpt.run(model, params, x, method="lm_logits")
    head = reference.cast(params["lm_head"])
    expected = x.astype(np.float64) @ head["kernel"].T + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
