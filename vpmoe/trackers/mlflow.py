"""MLflow: a run for each step in one experiment, found again by its tags.

What it has is read from the histories of the run's metrics at the start. Databases reject a point that they
have, but MLflow's files do not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import batched

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from vpmoe.failure import Permanent, Retriable
from vpmoe.trackers.reader import TrackedStep
from vpmoe.trackers.rows import Row

METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
"""Limits of MLflow's log-batch."""
PARAM_LENGTH = 6000
"""Longest value of a parameter."""


@contextmanager
def asking(where: str) -> Iterator[None]:
    """Raises Permanent for what MLflow refuses in the block, Retriable if it cannot answer."""
    try:
        yield
    except MlflowException as error:
        said = f"MLflow at {where}: {error}."
        if error.get_http_status_code() < 500:
            raise Permanent(
                f"{said} Name its store with --uri, as sqlite:///mlflow.db or http://HOST:5000; a run or "
                "experiment that was deleted there has to be restored."
            ) from error
        raise Retriable(f"{said} Start the command again when MLflow answers: it continues.") from error


class MLflow:
    """An experiment of MLflow."""

    def __init__(self, uri: str | None, experiment: str) -> None:
        """`uri`: of the tracking store; None is MLflow's own default, MLFLOW_TRACKING_URI."""
        self._where = uri or "its default address"
        with asking(self._where):
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)

    def open(self, step: TrackedStep) -> "StepRun":
        """The step's run."""
        with asking(self._where):
            return StepRun(self._client, *self._found_or_created(step), self._where)

    def _found_or_created(self, step: TrackedStep) -> tuple[str, list[Param]]:
        """The id of the step's run, and the parameters that it has not."""
        tags = {"vpmoe.run": step.run, "vpmoe.step": step.name}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if found:
            return found[0].info.run_id, []
        name = f"{step.run_name}/{step.name}"
        tags |= {"vpmoe.role": step.role, "vpmoe.axis": step.axis}
        created = self._client.create_run(self._experiment, tags=tags, run_name=name)
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in step.config.items()]
        return created.info.run_id, params


class StepRun:
    """One step's run."""

    def __init__(self, client: MlflowClient, run_id: str, params: Sequence[Param], where: str) -> None:
        self._client, self._id, self._where = client, run_id, where
        for some in batched(params, PARAMS_AT_ONCE):
            client.log_batch(run_id, params=some)
        self._has = {
            (name, point.step, point.timestamp)
            for name in client.get_run(run_id).data.metrics
            for point in client.get_metric_history(run_id, name)
        }

    def write(self, rows: Sequence[Row], ended: bool) -> int:
        """As TrackerRun.write. A row of which some values were written counts."""
        new = [(row, list(self._new(row))) for row in rows]
        with asking(self._where):
            for some in batched((metric for _, metrics in new for metric in metrics), METRICS_AT_ONCE):
                self._client.log_batch(self._id, metrics=some)
                self._has.update((one.key, one.step, one.timestamp) for one in some)
            if ended:
                self._client.set_terminated(self._id)
        return sum(1 for _, metrics in new if metrics)

    def _new(self, row: Row) -> Iterator[Metric]:
        time = round(row.time.timestamp() * 1000)
        for name, value in row.values.items():
            if (name, row.x, time) not in self._has:
                yield Metric(name, value, time, row.x)

    def close(self) -> None:
        """As TrackerRun.close."""
