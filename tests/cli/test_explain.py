"""`bagscope explain` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bagscope.mil.score_file import read_score_file, write_score_file
from tests.cli.conftest import Ran, files_of, leftovers
from tests.pipeline.explainable import explainable_run

Command = Callable[..., Ran]


@pytest.mark.slow
def test_one_bad_case_stops_no_other_and_running_again_changes_nothing(
    bagscope: Command, tmp_path: Path
) -> None:
    run = explainable_run(tmp_path / "study", {"a": 7, "b": 9, "c": 12})
    path = run / "scores" / "c.h5"
    file = read_score_file(path)
    write_score_file(path, dataclasses.replace(file, scores=np.full_like(file.scores, np.nan)))
    how = ("--methods", "necessity,search", "--controls", 2, "--shares", "0.2")
    before = files_of(run.parents[1])
    planned = bagscope("explain", run, *how, "--dry-run")
    assert planned.code == 0
    assert "3 cases, label, out of fold, by the members that never saw them" in planned.out
    assert files_of(run.parents[1]) == before
    ran = bagscope("explain", run, *how, "--dose-share", 0.2, "--workers", 1)
    assert ran.code == 1
    assert "2 done, 1 failed" in ran.out
    assert "12 of 12 tiles have scores that are no finite numbers" in ran.out
    assert "Remove hottest 20 %: " in ran.out
    folder = run.parents[1] / "explanations" / "made"
    made = files_of(folder)
    names = {"complete.json", "effects.csv", "explanation.json", "regions.geojson", "search.csv"}
    cases = {f"{case}/{name}" for case in "ab" for name in (*names, "tiles.csv")}
    assert set(made) == cases | {"summary.csv", "summary.json"}
    again = bagscope("explain", run, *how, "--dose-share", 0.2, "--slide", "a", "--json")
    assert again.code == 0
    events = [json.loads(line) for line in again.out.splitlines()]
    assert [e["outcome"] for e in events if e["event"] == "slide_finished"] == ["skipped"]
    (said,) = (event for event in events if event["event"] == "explained")
    assert said["cases"] == 2 and said["sentences"]
    assert files_of(folder) == made
    assert leftovers(tmp_path) == []
    # Every file of it is vouched for.
    table = folder / "a" / "effects.csv"
    table.write_bytes(table.read_bytes().replace(b"1", b"2", 1))
    verified = bagscope("verify", run.parents[1])
    assert verified.code == 1
    assert "explanations/made/a/effects.csv" in verified.out


def test_wrong_usage_is_one_sentence(bagscope: Command, tmp_path: Path) -> None:
    ran = bagscope("explain", tmp_path / "gone")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"{tmp_path / 'gone'}: no such folder; name a run, or a prediction"
    (tmp_path / "runs" / "made").mkdir(parents=True)
    (tmp_path / "cohort.csv").write_text("slide_id,path\na,a.svs\n")
    ran = bagscope("explain", tmp_path / "runs" / "made")
    assert ran.code == 2
    assert ran.err.endswith("name a run that has come to its end, or a prediction")
    assert bagscope("explain", tmp_path, "--shares", "1;2").code == 2


@pytest.mark.slow
def test_a_damaged_score_file_is_told_and_the_others_are_explained(
    bagscope: Command, tmp_path: Path
) -> None:
    run = explainable_run(tmp_path / "study", {"a": 7, "b": 9})
    (run / "scores" / "b.h5").write_bytes(b"no score file")
    ran = bagscope("explain", run, "--methods", "necessity", "--controls", 1, "--workers", 1)
    assert ran.code == 1
    assert "1 case, label" in ran.out and "1 done" in ran.out
    assert "b.h5" in ran.out
