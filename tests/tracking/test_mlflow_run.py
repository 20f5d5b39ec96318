"""What one MLflow run is sent, and where its store lies."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric

from modular_lm.tracking.mlflow_run import Point, artifact_location, batches

_LINES = st.lists(st.integers(1, 2300), max_size=8)


@given(lengths=_LINES)
@settings(deadline=None, max_examples=50)
def test_batches_are_whole_lines_in_order(lengths: list[int]) -> None:
    lines = [[Point(f"k{i}", 0.0, 0, step) for i in range(n)] for step, n in enumerate(lengths)]
    made = list(batches(lines))
    assert [p for batch in made for p in batch] == [p for line in lines for p in line]
    assert all(0 < len(batch) <= 1000 for batch in made)
    for step, length in enumerate(lengths):
        if length <= 1000:
            holders = [batch for batch in made if any(p.step == step for p in batch)]
            assert len(holders) == 1


def test_artifact_location() -> None:
    assert artifact_location("sqlite:////a b/mlflow.db") == "file:///a%20b/mlartifacts"
    assert artifact_location("http://tracker:5000") is None
    assert artifact_location("postgresql://host/db") is None


def test_metric_entity_takes_a_point_as_it_is() -> None:
    metric = Metric(*Point("k", 1.5, 1000, 7))
    assert (metric.key, metric.value, metric.timestamp, metric.step) == ("k", 1.5, 1000, 7)
