"""The final scores of a fine-tuning, their intervals, and the baselines beside them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.cluster import processes
from gptjax.config.schema import TaskKind, TaskSpec
from gptjax.data import tasks
from gptjax.data.tables.labelled import LabelledTable
from gptjax.errors import Preempted, StopRequested, brief
from gptjax.evaluate import calibration, intervals, linear, metrics, score
from gptjax.evaluate.linear import Budget
from gptjax.evaluate.score import never_stop
from gptjax.mesh import Params
from gptjax.train.context import RunContext
from gptjax.train.stages import Scores, Stage

# The longest time of the linear model: these seconds, or this share of the training if it is more.
_LINEAR_SECONDS = 20.0
_LINEAR_SHARE = 0.1

Entry = dict[str, Any]
"""An entry of the summary, or a part of one."""


def is_complete(stage: Stage, entry: Entry) -> bool:
    """Returns whether an entry of the summary has all that `summarise` puts there.

    An entry lacks something if an earlier version wrote it, or a run without the linear model, or
    if the linear model was left out. Then it had too little time or an error, and is tried again.
    """
    if stage.spec is None:
        return True
    baselines = entry.get("baselines", {})
    model = baselines.get("linear", {"left_out": "not fitted"})
    fitted = not stage.tables or "left_out" not in model
    return "intervals" in entry and bool(baselines) and fitted


def summarise(
    context: RunContext,
    stage: Stage,
    params: Params,
    scores: Scores,
    steps: int,
    seconds: float,
) -> Entry:
    """Scores the test split if the stage has one, and compares the scores with the baselines.

    All processes must call this function. Process 0 alone fits the linear model, and the other
    processes wait for it.

    Args:
      context: the run.
      stage: the fine-tuning.
      params: the best parameters of the stage.
      scores: the validation scores of these parameters.
      steps: the number of steps that were taken.
      seconds: the time that the training took.

    Returns:
      The entry of the stage in the summary, without its speed:

      "steps"
      "stopped_early"       True if `Stage.patience` has ended the training, or missing
      "validation", "test"  the scores; there may be no test
      "floor"               split -> scores of the majority-class baseline
      "intervals"           split -> metric -> [low, high]
      "baselines"           "majority" (the same as "floor") and "linear", from `linear_entry`
      "calibration"         "temperature", and split -> `calibration.report`. The values of the
                            validation are optimistic, because the temperature was fitted on it.
                            A regression has no such entry.

      An ablation needs neither "intervals" nor "baselines" nor "calibration", so its runs
      (`Options.trial`) lack them.

    Raises:
      Preempted: the run was asked to stop.
    """
    assert stage.spec is not None
    validation = dict(scores)
    # A checkpoint of an earlier version has no temperature.
    temperature = validation.pop("temperature", 1.0)
    try:
        found, logits = _score(context, stage, params, steps, temperature)
        summary: Entry = {"steps": steps}
        if steps < stage.total_steps:
            summary["stopped_early"] = True
        summary |= {"validation": validation, **found}
        summary["floor"] = stage.baselines
        if context.options.trial:
            return summary
        if calibration.is_defined(stage.spec.kind):
            reports = {
                split: calibration.report(outputs, stage.labels[split], temperature)
                for split, outputs in logits.items()
            }
            summary["calibration"] = {"temperature": temperature, **reports}
            context.options.reporter.say(f"{stage.name}: {_describe_calibration(summary)}")
        answers = {
            split: score.predictions(stage.spec, outputs) for split, outputs in logits.items()
        }
        summary["intervals"] = {
            split: intervals.intervals(
                list(baseline), stage.labels[split], answers[split], len(stage.spec.labels)
            )
            for split, baseline in stage.baselines.items()
        }
        baselines: Entry = {"majority": stage.baselines}
        if stage.tables:
            baselines["linear"] = _linear(context, stage, answers, seconds)
        return summary | {"baselines": baselines}
    except StopRequested:
        text = f"{stage.name}: asked to stop; saved; the same command tests it"
        raise Preempted(text) from None


def _score(
    context: RunContext, stage: Stage, params: Params, steps: int, temperature: float
) -> tuple[dict[str, Scores], dict[str, np.ndarray]]:
    """Returns the test scores as {"test": scores}, and split -> task outputs."""
    assert stage.spec is not None
    found, logits = {}, {}
    for split, scorer in stage.final.items():
        # The validation scores are known. Its outputs are needed for the intervals.
        if split == "validation" and context.options.trial:
            continue
        scores, logits[split] = scorer(params)
        if split == "test":
            if calibration.is_defined(stage.spec.kind):
                loss = calibration.task_loss(logits[split], stage.labels[split], temperature)
                scores["calibrated_task_loss"] = loss
            found[split] = scores
            context.log.write_once(stage.name, split, steps, scores)
    return found, logits


def _describe_calibration(summary: Entry) -> str:
    """Returns a line for the user about the temperature and the expected calibration error."""
    entry = summary["calibration"]
    split = "test" if "test" in entry else "validation"
    optimistic = "" if split == "test" else " (optimistic: the temperature was fitted on it)"
    return (
        f"temperature {entry['temperature']:.2f}; expected calibration error on {split} "
        f"{entry[split]['ece']:.1%}, {entry[split]['ece_before']:.1%} without it{optimistic}"
    )


def _linear(
    context: RunContext, stage: Stage, answers: Mapping[str, np.ndarray], seconds: float
) -> Entry:
    """Fits the linear model in process 0, tells the user, and returns its entry in all processes.

    Args:
      context: the run.
      stage: the fine-tuning.
      answers: split -> the answers of GPT.
      seconds: the time that the training took.
    """
    assert stage.spec is not None
    spec, alone = stage.spec, jax.process_count() == 1
    # In a run of several processes the others wait, so the time is short. A request to stop is
    # noticed after it, because all processes must look for such a request equally often.
    limit = linear_seconds(seconds if alone else 0.0)
    check_stop = context.setup.check_stop if alone else never_stop
    names = list(stage.baselines["validation"])
    say = context.options.reporter.say
    say(f"{stage.name}: fitting the linear model on the same rows, in at most {limit:,.0f} s")

    found: Entry = processes.broadcast(
        "the linear model",
        lambda: linear_entry(spec, stage.tables, names, limit, check_stop, answers),
    )
    say(f"{stage.name}: {describe(found)}")
    return found


def linear_seconds(training: float) -> float:
    """Returns the longest time of the linear model beside a training of so many seconds."""
    return max(_LINEAR_SECONDS, _LINEAR_SHARE * training)


def linear_entry(
    spec: TaskSpec,
    tables: Mapping[str, LabelledTable],
    metric_names: Sequence[str],
    seconds: float,
    check_stop: Callable[[], None] = never_stop,
    answers: Mapping[str, np.ndarray] | None = None,
) -> Entry:
    """Fits the linear model of a task, and scores it.

    An error in the linear model does not end the run, because the training is more important.

    Args:
      spec: the task, with the names of its labels.
      tables: split -> rows.
      metric_names: names from `metrics.parse`. The first metric chooses C.
      seconds: the longest time that it may take, without the import of its libraries.
      check_stop: a function that is called while rows are read and between two fits. It raises
        `StopRequested` if the run was asked to stop.
      answers: split -> the answers of GPT, with which the scores are compared.

    Returns:
      A dictionary with the scores of each split, "seconds", "C" (or "alpha" in a regression) and
      "reduced", a list of what the time or the memory did not allow. With `answers`, "difference"
      is split -> metric -> [difference, low, high]. The difference is the score of GPT minus the
      score of the linear model. If there is no linear model, the dictionary has only "left_out",
      which is the reason.

    Raises:
      StopRequested: `check_stop` raised it.
    """
    try:
        linear.load_libraries()
        budget = Budget(seconds)
        model = linear.fit(spec, tables, metric_names[0], budget, check_stop)
        entry: Entry = {}
        for split, given in model.answers.items():
            labels, classes = tasks.label_ids(spec, tables[split]), len(spec.labels)
            entry[split] = metrics.compute(metric_names, labels, given, classes)
            if answers:
                difference = intervals.differences(
                    metric_names, labels, answers[split], given, classes
                )
                entry.setdefault("difference", {})[split] = difference
    except StopRequested:
        raise
    except linear.LeftOut as error:
        return {"left_out": str(error)}
    except Exception as error:
        logging.exception("the linear model failed")
        return {"left_out": brief(error)}
    if spec.kind is TaskKind.REGRESSION:
        entry["alpha"] = 1 / model.strength
    else:
        entry["C"] = model.strength
    entry |= {"seconds": budget.spent, "reduced": list(model.reduced)}
    return entry


def describe(entry: Entry) -> str:
    """Returns a line for the user about an entry of the linear model."""
    if "left_out" in entry:
        return f"the linear model is left out: {entry['left_out']}"
    strength = next(f"{name}={entry[name]:g}" for name in ("C", "alpha") if name in entry)
    return "; ".join([f"linear model with {strength}, {entry['seconds']:.0f} s", *entry["reduced"]])
