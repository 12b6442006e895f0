"""A saved state is restored bit for bit, or refused, whatever happened to its files."""

import pathlib
import shutil
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from gptjax import mesh
from gptjax.checkpoint import load
from gptjax.checkpoint.background import SaveMonitor
from gptjax.checkpoint.checksum import checksums
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.store import CheckpointStore
from gptjax.config.schema import CheckpointConfig, TaskSpec
from gptjax.errors import UserError
from gptjax.state import TrainState

pytestmark = pytest.mark.devices(8)

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_)


def make_state(seed: int, step: int = 0) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        "token_embedding": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "head": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16)},
    }
    moments = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    return TrainState(jnp.int32(step), params, {"mu": moments, "count": jnp.int32(step)})


def make_meta(**changes) -> Meta:
    tokenizer = small.small_tokenizer()
    values = {
        "stage": "finetune", "model": small.config(), "tokenizer_json": tokenizer.to_json(),
        "tokenizer_hash": tokenizer.hash, "metric": "accuracy", "experiment": {"seed": 1},
        "task": TaskSpec("multiple_choice", "q", choices=("a", "b"), labels=("1", "2")),
        "data_fingerprint": "abc",
    }  # fmt: skip
    return Meta(**(values | changes))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def anything(_: Meta) -> None:
    """The check of a run that accepts any checkpoint."""


@pytest.fixture
def saved(tmp_path):
    """A workdir with a stage that has saved steps 1, 2 and 3."""
    with_three = CheckpointStore(
        str(tmp_path), "finetune", CheckpointConfig(keep_newest=3), "accuracy"
    )
    for step in (1, 2, 3):
        with_three.save(step, make_state(step, step), make_meta(), {"accuracy": 0.1 * step})
    with_three.close()
    return tmp_path


def reopen(workdir, **kwargs) -> CheckpointStore:
    return CheckpointStore(str(workdir), "finetune", CheckpointConfig(keep_newest=3), **kwargs)


def test_state_and_meta_come_back(saved):
    checkpoints = reopen(saved, metric="accuracy", read_only=True)
    state, step = checkpoints.restore_newest(make_state(9), anything)
    assert step == 3
    assert jax.tree.structure(state) == jax.tree.structure(make_state(3))
    assert bits(state) == bits(make_state(3, 3))
    assert [x.dtype for x in jax.tree.leaves(state)] == [
        x.dtype for x in jax.tree.leaves(make_state(3))
    ]
    meta, sums = checkpoints.meta_and_checksums(2)
    assert meta == make_meta()
    assert sums == checksums(make_state(2, 2))
    assert checkpoints.metrics(2) == {"accuracy": pytest.approx(0.2)}
    assert bits(checkpoints.restore_params(1, make_state(9).params)) == bits(make_state(1).params)
    checkpoints.close()


def test_a_meta_without_a_task_comes_back():
    meta = make_meta(task=None, stage="pretrain")
    assert Meta.from_dict(meta.to_dict(), "here") == meta


def test_nothing_saved_is_none(tmp_path):
    checkpoints = reopen(tmp_path)
    assert checkpoints.restore_newest(make_state(1), anything) is None
    assert checkpoints.steps() == []
    checkpoints.close()


def test_an_asynchronous_save_holds_the_step_it_was_asked_at(tmp_path):
    @jax.jit
    def create():
        return TrainState(jnp.int32(0), {"w": jnp.arange(1 << 20, dtype=jnp.float32)}, {})

    step = jax.jit(
        lambda s: TrainState(s.step + 1, jax.tree.map(lambda w: w * 1.5 + 1, s.params), {}),
        donate_argnums=0,
    )
    checkpoints = reopen(tmp_path)
    state = step(create())
    expected = np.array(state.params["w"])
    checkpoints.save(1, state, make_meta())
    for _ in range(20):
        state = step(state)
    checkpoints.wait()
    restored = checkpoints.restore(1, create())
    assert np.asarray(restored.params["w"]).tobytes() == expected.tobytes()
    assert not np.array_equal(expected, state.params["w"])
    checkpoints.close()


@pytest.mark.parametrize(
    ("metric", "scores", "kept", "order"),
    [
        ("loss", [3.0, 1.0, 5.0, 4.0, 6.0, 7.0], [2, 5, 6], [2, 5, 6]),
        ("accuracy", [0.3, 0.9, 0.5, 0.9, 0.6, 0.7], [4, 5, 6], [4, 6, 5]),
        ("accuracy", [0.3, None, 0.2, None, 0.1, None], [1, 5, 6], [1, 5, 6]),
        ("pearson", [-0.5, float("nan"), -0.9, -0.8, -0.7, float("nan")], [1, 5, 6], [1, 5, 6]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, metric, scores, kept, order):
    policy = CheckpointConfig(keep_newest=2, keep_best=1)
    checkpoints = CheckpointStore(str(tmp_path), "finetune", policy, metric)
    for step, score in enumerate(scores, 1):
        values = None if score is None else {metric: score}
        checkpoints.save(step, make_state(step), make_meta(metric=metric), values)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert checkpoints.best_first() == order
    checkpoints.close()
    again = CheckpointStore(str(tmp_path), "finetune", policy, metric, read_only=True)
    assert again.best_first() == order
    again.close()


@pytest.mark.parametrize("harm_scores", [pathlib.Path.unlink, lambda p: p.write_text("{")])
def test_a_lost_scores_file_loses_neither_the_best_step_nor_its_temperature(tmp_path, harm_scores):
    with CheckpointStore(str(tmp_path), "finetune", metric="accuracy") as checkpoints:
        for step, score in ((1, 0.9), (2, float("nan")), (3, 0.2)):
            scores = {"accuracy": score, "temperature": 1.0 + step / 4}
            checkpoints.save(step, make_state(step), make_meta(), scores)
        checkpoints.wait()
        before = checkpoints.metrics(1)
        path = pathlib.Path(checkpoints.directory) / "scores.json"
    harm_scores(path)
    with CheckpointStore(str(tmp_path), "finetune", metric="accuracy", read_only=True) as again:
        assert again.best_first() == [1, 3, 2]
        assert again.metrics(1) == before == {"accuracy": 0.9, "temperature": 1.25}
        assert again.restore_best_params(make_state(1).params)[0] == 1


def test_no_best_kept_where_none_is_wanted(tmp_path):
    policy = CheckpointConfig(keep_newest=1, keep_best=0)
    checkpoints = CheckpointStore(str(tmp_path), "finetune", policy, "accuracy")
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpoints.save(step, make_state(step), make_meta(), {"accuracy": score})
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.close()


def largest(step: pathlib.Path, pattern: str) -> pathlib.Path:
    files = [path for path in step.glob(pattern) if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def harm(step: pathlib.Path, how: str) -> None:
    """Damages the folder of a step in one of the ways of `DAMAGE`."""
    if how == "truncated":
        path = largest(step, "optimizer/**/d/*")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        path = largest(step, "optimizer/**/d/*")
        # In several places: orbax does not read every byte of the file.
        for part in range(1, 8):
            flip(path, path.stat().st_size * part // 8)
    elif how == "deleted":
        largest(step, "params/**/d/*").unlink()
    elif how == "no arrays":
        shutil.rmtree(step / "params")
    elif how == "broken json":
        path = largest(step, "meta/*")
        path.write_text(path.read_text()[:-20])
    else:
        path = largest(step, "meta/*")
        path.write_bytes(b"")


DAMAGE = ("truncated", "flipped", "deleted", "no arrays", "broken json", "empty json")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside(saved, caplog, how):
    harm(saved / "checkpoints" / "finetune" / "3", how)
    checkpoints = reopen(saved, metric="accuracy")
    state, step = checkpoints.restore_newest(make_state(9), anything)
    assert (step, bits(state)) == (2, bits(make_state(2, 2)))
    named = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert len(named) == 1
    assert named[0].startswith(f"checkpoint {saved}/checkpoints/finetune/3 is damaged (")
    assert "\n" not in named[0]
    assert checkpoints.steps() == [1, 2]
    assert (saved / "checkpoints" / "damaged" / "finetune-3").is_dir()
    # The step can be saved again.
    checkpoints.save(3, make_state(7, 3), make_meta(), {"accuracy": 0.5})
    checkpoints.wait()
    assert bits(checkpoints.restore(3, make_state(9))) == bits(make_state(7, 3))
    checkpoints.close()


def test_every_checkpoint_damaged_is_one_line(saved):
    for step in (1, 2, 3):
        harm(saved / "checkpoints" / "finetune" / str(step), "flipped")
        harm(saved / "checkpoints" / "finetune" / str(step), "deleted")
    checkpoints = reopen(saved, metric="accuracy")
    with pytest.raises(UserError, match=r"no checkpoint can be read.*`workdir`") as info:
        checkpoints.restore_newest(make_state(9), anything)
    assert "\n" not in str(info.value)
    # If all fail, the cause may be another one than damage, so they stay where they are.
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.close()


def test_what_a_killed_run_did_not_delete_goes_at_the_end(saved):
    """Steps 1 to 4 exist and 1 is the best. The two newest and the best are kept."""
    three = reopen(saved, metric="accuracy")
    three.set_metrics(1, {"accuracy": 0.9})
    three.save(4, make_state(4, 4), make_meta(), {"accuracy": 0.0})
    three.close()
    assert reopen(saved, read_only=True).steps() == [1, 2, 3, 4]
    policy = CheckpointConfig(keep_newest=2, keep_best=1)
    two = CheckpointStore(str(saved), "finetune", policy, "accuracy")
    two.wait()
    assert two.steps() == [1, 3, 4]
    two.close()
    assert reopen(saved, read_only=True).steps() == [1, 3, 4]


def test_a_damaged_best_checkpoint_leaves_the_next_best(saved):
    harm(saved / "checkpoints" / "finetune" / "3", "deleted")
    checkpoints = reopen(saved, metric="accuracy")
    step, params = checkpoints.restore_best_params(make_state(9).params)
    assert (step, bits(params)) == (2, bits(make_state(2).params))
    checkpoints.close()


def test_no_flipped_bit_is_ever_read_as_weights(saved):
    step = saved / "checkpoints" / "finetune" / "3"
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    rng = np.random.default_rng(0)
    expected = bits(make_state(3, 3))
    checkpoints = reopen(saved, read_only=True)
    noticed = 0
    for i in range(60):
        path = files[i % len(files)]
        position, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, position, bit)
        try:
            assert bits(checkpoints.restore(3, make_state(9))) == expected, (path, position, bit)
        except AssertionError:
            raise
        except Exception:
            noticed += 1
        flip(path, position, bit)
    assert noticed > 10
    assert bits(checkpoints.restore(3, make_state(9))) == expected
    checkpoints.close()


def test_a_checkpoint_of_another_run_is_refused_and_kept(saved):
    before = runs.snapshot(saved)

    def refuse(meta: Meta) -> None:
        assert meta == make_meta()
        raise UserError("another tokenizer")

    checkpoints = reopen(saved, metric="accuracy")
    with pytest.raises(UserError, match="another tokenizer"):
        checkpoints.restore_newest(make_state(9), refuse)
    checkpoints.close()
    assert runs.snapshot(saved) == before


def test_a_tokenizer_that_was_tampered_with_is_refused(saved):
    values = make_meta().to_dict()
    other = values["tokenizer_json"].replace('"cat', '"dog', 1)
    with pytest.raises(UserError, match=r"here: .*tokenizer"):
        Meta.from_dict(values | {"tokenizer_json": other}, "here")


def random_array(dtype, shape=(8, 24), seed=0):
    rng = np.random.default_rng(seed)
    if dtype == jnp.bool_:
        return jnp.asarray(rng.integers(0, 2, shape), jnp.bool_)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(-100, 100, shape), dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_do_not_depend_on_the_layout(dtype):
    array = random_array(dtype)
    expected = checksums({"token_embedding": array})
    assert list(expected) == ["['token_embedding']"]
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        places = mesh.state_sharding({"token_embedding": array}, small.mesh(*sizes))
        assert checksums(jax.device_put({"token_embedding": array}, places)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_see_every_flip_and_swap(dtype):
    array = np.asarray(random_array(dtype))
    whole = checksums({"x": jnp.asarray(array)})
    rng = np.random.default_rng(1)
    changed = 0
    for _ in range(40):
        i, j = rng.choice(array.size, 2, replace=False)
        other = array.copy()
        raw = other.reshape(-1).view(np.uint8)
        if dtype == jnp.bool_:
            raw[i] ^= 1
        else:
            raw[rng.integers(raw.size)] ^= np.uint8(1 << rng.integers(8))
        assert checksums({"x": jnp.asarray(other)}) != whole
        swapped = array.copy().reshape(-1)
        swapped[[i, j]] = swapped[[j, i]]
        if swapped[i].tobytes() != swapped[j].tobytes():
            changed += 1
            assert checksums({"x": jnp.asarray(swapped.reshape(array.shape))}) != whole
    assert changed > 10


def test_a_checkpoint_of_one_mesh_is_read_on_another(tmp_path):
    state = make_state(1, 1)
    places = [mesh.state_sharding(state, small.mesh(*sizes)) for sizes in ((8, 1, 1), (1, 4, 2))]
    checkpoints = reopen(tmp_path)
    checkpoints.save(1, jax.device_put(state, places[0]), make_meta())
    checkpoints.wait()
    like = jax.device_put(make_state(2), places[1])
    restored = checkpoints.restore(1, like)
    assert bits(restored) == bits(state)
    assert restored.params["token_embedding"].sharding == like.params["token_embedding"].sharding
    assert len(restored.params["token_embedding"].sharding.device_set) == 8
    checkpoints.close()


def test_find_takes_a_workdir_a_stage_or_a_step(saved):
    root = saved / "checkpoints" / "finetune"
    assert load.find(str(saved)) == (str(saved), "finetune", None)
    assert load.find(f"{saved}/") == (str(saved), "finetune", None)
    assert load.find(str(root)) == (str(saved), "finetune", None)
    assert load.find(str(root / "2")) == (str(saved), "finetune", 2)
    for wrong in (root / "7", saved / "checkpoints" / "pretrain", saved / "nowhere"):
        with pytest.raises(UserError, match=rf"`path`={wrong}: no checkpoint there"):
            load.find(str(wrong))


def test_a_path_means_the_best_step_or_the_one_it_names(saved):
    for path, expected in ((saved, 3), (saved / "checkpoints" / "finetune" / "1", 1)):
        found = load.open_checkpoint(str(path))
        assert (found.step, found.meta) == (expected, make_meta())
        found.store.close()


class Saving:
    """A manager whose save never ends, as if orbax waited for other processes at a barrier."""

    def is_saving_in_progress(self) -> bool:
        return True


def test_a_save_that_fails_is_seen_by_the_barrier_it_comes_to():
    """In a background thread an error makes the save fail; in the main thread it is only raised."""
    monitor = SaveMonitor()

    def background():
        try:
            raise OSError(28, "No space left on device")
        finally:
            monitor.options().barrier_sync_fn(key="k", timeout_ms=1)

    with pytest.raises(OSError, match="No space"):
        background()
    assert not monitor.failed
    with futures.ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(background).exception(), OSError)
    assert monitor.failed
    with pytest.raises(OSError, match="No space"):
        monitor.finish(Saving())
