"""Steps of a record run: each under its limit, the rest goes on."""

from pathlib import Path

import pytest

from bench.record_run import Outcome, Step, _parser, run_steps, steps_of
from bench.serving import startup_phases

LONG_S = 60.0


def python(code: str) -> list[str]:
    return ["-c", code]


def results(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.name, outcome.result) for outcome in outcomes]


def test_a_step_that_fails_or_hangs_is_named_and_the_rest_goes_on() -> None:
    steps = [
        Step("bad", python("raise SystemExit(3)"), LONG_S),
        Step("stuck", python("import time; time.sleep(600)"), 0.5),
        Step("good", python("pass"), LONG_S),
    ]
    expected = [("bad", "failed"), ("stuck", "out of time"), ("good", "ok")]
    assert results(run_steps(steps, LONG_S)) == expected


def test_no_step_is_begun_when_the_time_of_all_is_over() -> None:
    steps = [
        Step("stuck", python("import time; time.sleep(600)"), LONG_S),
        Step("late", python("pass"), LONG_S),
    ]
    assert results(run_steps(steps, 0.5)) == [("stuck", "out of time"), ("late", "not begun")]


@pytest.mark.parametrize(("tp", "models"), [(1, 3), (2, 2), (4, 3)])
def test_what_must_be_right_is_run_before_what_is_timed(tp: int, models: int) -> None:
    steps = steps_of(_parser().parse_args(["--tp", str(tp), "--dry-run"]))
    names = [step.name for step in steps]
    assert names[: len(names) - models] == ["same tokens", "collectives"][: 1 + (tp > 1)]
    for step in steps[-models:]:
        assert "--dry-run" in step.command
        model = step.command[step.command.index("--model") + 1]
        assert (Path(__file__).parents[3] / "bench" / "models" / model).is_dir()


def test_start_up_times_are_read_by_phase() -> None:
    samples = {
        'lockstep_startup_seconds{model_name="m",phase="load"}': 1.234,
        'lockstep_startup_seconds{model_name="m",phase="total"}': 2.0,
        'lockstep_steps_total{model_name="m"}': 3.0,
    }
    assert startup_phases(samples) == {"load": 1.23, "total": 2.0}
