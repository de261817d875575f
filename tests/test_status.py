"""`make status` says how far a graph is, from its logs and records alone."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from immunity_lib import status
from immunity_lib.job_state import JobState
from immunity_lib.recipes import attacked_models, judged_models, trained_models
from immunity_lib.records import read_record, write_record
from immunity_lib.settings import load_preset

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path):
    settings = load_preset("smoke", output_folder=str(tmp_path), epochs=10)
    settings.runs.mkdir(parents=True)
    return settings


def put_job(settings, job, state, seconds=30.0, seen=NOW, **more):
    started = seen - timedelta(seconds=seconds)
    content = {"kind": "job", "job": job, "state": state, "error": "", "machine": "node7"}
    content |= {"started": started.isoformat(), "seen": seen.isoformat(), "seconds": seconds}
    write_record(settings.runs / "jobs" / f"{job}.json", content | more)


def put_log(settings, model, epochs, seconds):
    log = settings.runs / "models" / str(model) / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps({"seconds": seconds}) + "\n" for _ in range(epochs)))


def test_every_job_of_the_graph_is_counted_once(settings):
    jobs = [str(job) for job in status.jobs_of(settings, NOW)]
    expected = sum(len(models(settings)) for models in (trained_models, attacked_models))
    assert len(set(jobs)) == len(jobs) == expected + len(judged_models(settings)) + 7


def test_before_anything_ran_all_of_it_waits(settings):
    printed = status.printed_status(settings, NOW)
    count = len(status.jobs_of(settings, NOW))
    waits, to_go = printed.splitlines()
    assert waits == f"preset smoke: 0 of {count} jobs done, {count} waiting"
    assert to_go.startswith("to go: 00_start_here, 01_expert_selection, 02_training, ")
    assert to_go.endswith("07_claims, of which none has ended yet")


def test_time_to_go_comes_from_measured_epochs(settings):
    """Of a model's own epochs, else of those of the models most like it."""
    models = trained_models(settings)
    alike = next(name for name in models if name.seed == 1)
    first = alike.model_copy(update={"seed": 0})
    unlike = next(name for name in models if name.regime != first.regime)
    for model in set(models) - {first, alike, unlike}:
        put_job(settings, f"02_training-{model}", "done")
    put_log(settings, first, 4, seconds=60.0)
    put_log(settings, unlike, 9, seconds=1000.0)
    for model in (first, alike, unlike):
        put_job(settings, f"02_training-{model}", "running")
    trainings = [job for job in status.jobs_of(settings, NOW) if job.trains]
    left, unknown = status.seconds_to_go(settings, trainings)
    beside = 30.0  # of a finished training that took no epoch
    assert left == pytest.approx(6 * 60 + 10 * 60 + 1 * 1000 + 3 * beside) and not unknown
    printed = status.printed_status(settings, NOW)
    assert f"{first} on node7 for 30 s: 4 of 10 epochs, 60 s each, about 6 min to go" in printed
    assert f"{alike} on node7 for 30 s: in the first of 10 epochs" in printed


def test_what_was_never_measured_is_named_instead_of_guessed(settings):
    jobs = status.jobs_of(settings, NOW)
    left, unknown = status.seconds_to_go(settings, jobs)
    assert left == 0 and "02_training" in unknown and "07_claims" in unknown


def test_jobs_beside_each_other_share_the_time(settings):
    one, two, *others = attacked_models(settings)
    for model in others:
        put_job(settings, f"03_attacks-{model}", "done", seconds=600.0)
    for model in trained_models(settings):
        put_job(settings, f"02_training-{model}", "done")
        put_log(settings, model, 10, 1.0)
    put_job(settings, f"03_attacks-{one}", "running", seconds=0.0)
    put_job(settings, f"03_attacks-{two}", "running", seconds=0.0)
    assert "to go: about 10 min with 2 at a time" in status.printed_status(settings, NOW)


def test_failed_stopped_and_killed_jobs_are_told_apart(settings):
    one, two, three, *_ = trained_models(settings)
    put_job(settings, f"02_training-{one}", "failed", error="TrainingDiverged: loss is nan")
    put_job(settings, f"02_training-{two}", "stopped", seen=NOW - timedelta(minutes=5))
    put_job(settings, f"02_training-{three}", "running", seen=NOW - timedelta(hours=3))
    printed = status.printed_status(settings, NOW)
    assert "1 failed, 1 stopped, 1 lost" in printed
    assert f"failed   02_training-{one} on node7, 0 s ago: TrainingDiverged: loss is nan" in printed
    assert f"stopped  02_training-{two} on node7, 5 min ago; the same command goes on" in printed
    assert f"lost     02_training-{three} on node7, 3 h 0 min ago" in printed


def test_of_a_graph_that_has_ended_no_job_runs(settings):
    put_job(settings, "07_claims", "running", seen=NOW - timedelta(seconds=3))
    assert "1 running" in status.printed_status(settings, NOW)
    assert "1 lost" in status.printed_status(settings, NOW, lost_after=0)


def test_results_from_before_jobs_kept_records_count_as_done(settings):
    executed = settings.runs / "notebooks" / "07_claims.ipynb"
    executed.parent.mkdir()
    executed.touch()
    (job,) = (job for job in status.jobs_of(settings, NOW) if str(job) == "07_claims")
    assert job.state == "done"


def test_a_damaged_record_of_a_job_is_no_error(settings):
    put_job(settings, "07_claims", "done")
    path = settings.runs / "jobs" / "07_claims.json"
    path.write_text(path.read_text()[:40])
    assert "0 of" in status.printed_status(settings, NOW)


def test_a_job_says_how_it_stands_while_it_runs_and_when_it_ended(settings):
    state = JobState(settings, "07_claims")
    with state.kept_fresh():
        deadline = datetime.now(UTC) + timedelta(seconds=10)
        while not state.path.exists() and datetime.now(UTC) < deadline:
            pass
        assert read_record(state.path)["state"] == "running"
    state.end("failed", "ValueError: no")
    record = read_record(state.path)
    assert (record["state"], record["error"]) == ("failed", "ValueError: no")
    assert record["started"] <= record["seen"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99, "99 s"), (150, "2 min"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations_read_as_people_say_them(seconds, said):
    assert status.duration(seconds) == said


def test_the_command_from_another_folder(settings, capsys, tmp_path):
    assert status.main(["--preset", "smoke", "--output", str(tmp_path)]) == 0
    assert "jobs done" in capsys.readouterr().out
    assert status.main(["--preset", "smoke", "--output", str(tmp_path / "elsewhere")]) == 0
    assert "nothing was started" in capsys.readouterr().out
    assert status.main(["--preset", "nosuch"]) == 2
    assert "valid names" in capsys.readouterr().err
