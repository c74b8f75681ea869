"""`bagscope init`: a study.yaml that says what the specs say, and a table to fill in."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bagscope.mil.splits.plan import SplitSpec
from bagscope.pipeline.study import StudySpec, open_study
from tests.cli.conftest import Ran, files_of

Command = Callable[..., Ran]
# By itself a method refuses what belongs to another one.
BESIDE = {"splits.test_share": {"method": "monte_carlo"}}


def uncommented(text: str) -> str:
    """Return a study.yaml with every default turned into a setting."""
    lines = (line.replace("#", "", 1) if is_setting(line) else line for line in text.splitlines())
    return "\n".join(lines)


def is_setting(line: str) -> bool:
    start = line.strip()
    return start[:1] == "#" and (start[1:2].strip() != "" or start[1:3] == "  ")


@pytest.fixture
def study(bagscope: Command, slides: Path, tmp_path: Path) -> Path:
    ran = bagscope("init", tmp_path / "study", "--slides", slides)
    assert ran.code == 0
    assert "3 slides" in ran.out
    return tmp_path / "study"


def test_a_new_study_sets_nothing(study: Path) -> None:
    assert open_study(study).spec == StudySpec()
    values = yaml.safe_load((study / "study.yaml").read_text())
    assert {name: value for name, value in values.items() if value} == {"cohort": "cohort.csv"}
    assert set(values) == {*StudySpec.model_fields} - {"labels"}


def test_every_setting_stands_there_with_its_default(study: Path) -> None:
    values = yaml.safe_load(uncommented((study / "study.yaml").read_text()))
    assert set(values) == set(StudySpec.model_fields)
    for section in ("tiling", "features", "splits", "train", "run"):
        kind = type(getattr(StudySpec(), section))
        assert set(values[section]) == set(kind.model_fields)
        for name, value in values[section].items():
            beside = BESIDE.get(f"{section}.{name}", {})
            assert kind(**beside, **{name: value}) == kind(**beside), name
    assert SplitSpec(method="monte_carlo").test_share == values["splits"]["test_share"]
    (target,) = values["targets"]
    assert target == {
        "column": "", "task": "classes", "classes": [], "positive": None, "time": None,
        "event": None, "weight": 1.0,
    }  # fmt: skip


def test_every_setting_has_a_reason_beside_it(study: Path) -> None:
    lines = (study / "study.yaml").read_text().splitlines()
    settings = [line for line in lines if is_setting(line)]
    assert len(settings) > 40
    assert [line for line in settings if not line.partition("  # ")[2]] == []
    page = "\n".join(settings)
    for choices in ("[none | macenko | reinhard]", "clam_sb", "survival]", "site_preserving"):
        assert choices in page


def test_the_table_of_a_folder_has_the_columns_to_fill_in(study: Path) -> None:
    rows = list(csv.DictReader((study / "cohort.csv").read_text().splitlines()))
    assert [*rows[0]] == ["slide_id", "path", "patient_id", "label"]
    assert {row["label"] for row in rows} == {""}
    cohort = open_study(study).cohort()
    assert not cohort.patient_id_given
    assert cohort.notes == ()


def test_what_is_set_is_no_comment(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    asked = ["--target", "grade:ordinal", "--set", "tiling.mpp=1.0"]
    asked += ["--set", "train.options.training.epochs=3"]
    ran = bagscope("init", tmp_path / "study", "--slides", slides, *asked)
    assert ran.code == 0
    assert "grade: what is to be predicted" in ran.out
    spec = open_study(tmp_path / "study").spec
    wanted = {
        "tiling": {"mpp": 1.0},
        "train": {"options": {"training": {"epochs": 3}}},
        "targets": [{"column": "grade", "task": "ordinal"}],
    }
    assert spec == StudySpec.model_validate(wanted)
    values = yaml.safe_load((tmp_path / "study/study.yaml").read_text())
    assert {name: values[name] for name in wanted} == wanted
    table = (tmp_path / "study/cohort.csv").read_text()
    assert table.startswith("slide_id,path,patient_id,grade\n")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("tiling.mp=1", "did you mean 'mpp'?"), ("tiling.mpp=fast", "tiling.mpp is 'fast'")],
)
def test_a_setting_that_does_not_fit_leaves_no_study(
    bagscope: Command, slides: Path, tmp_path: Path, setting: str, message: str
) -> None:
    ran = bagscope("init", tmp_path / "study", "--slides", slides, "--set", setting)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "study").exists()


def test_a_table_of_one_s_own_gets_no_columns(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("slide_id,path,stage\na,slides/a.svs,2\n")
    ran = bagscope("init", tmp_path / "study", "--slides", tmp_path / "table.csv")
    assert ran.code == 0
    assert (tmp_path / "study/cohort.csv").read_text().splitlines()[0] == "slide_id,path,stage"


def test_init_again_keeps_edits_and_refuses_other_settings(
    bagscope: Command, slides: Path, study: Path
) -> None:
    again = ("init", study, "--slides", slides)
    edited = (study / "study.yaml").read_text().replace("#mpp: 0.5", "mpp: 1.0")
    (study / "study.yaml").write_text(edited)
    table = (study / "cohort.csv").read_text().replace(",,\n", ",,tumor\n")
    (study / "cohort.csv").write_text(table)
    before = files_of(study)
    ran = bagscope(*again)
    assert ran.code == 0
    assert "kept as it is" in ran.out
    assert bagscope(*again, "--set", "tiling.mpp=1.0").code == 0
    ran = bagscope(*again, "--set", "tiling.mpp=2.0")
    assert ran.code == 2
    assert "init changes no study.yaml" in ran.err
    assert files_of(study) == before


def test_an_init_that_was_killed_is_finished_and_another_cohort_refused(
    bagscope: Command, slides: Path, study: Path
) -> None:
    before = files_of(study)
    (study / "study.yaml").unlink()  # as a kill in the middle of init leaves it
    assert bagscope("init", study, "--slides", slides).code == 0
    assert files_of(study) == before
    (slides / "c.svs").unlink()
    ran = bagscope("init", study, "--slides", slides)
    assert ran.code == 2
    assert "holds 3 slides that are not the 2" in ran.err
