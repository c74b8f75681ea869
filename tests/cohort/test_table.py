from __future__ import annotations

import csv
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.artifacts import portable_name_problem
from bagscope.cohort.table import (
    Cohort,
    SlideRow,
    load_cohort,
    missing_paths,
    write_cohort_csv,
)
from bagscope.errors import CohortError


def table(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(CohortError) as caught:
        load_cohort(path, **options)
    return str(caught.value)


def test_every_column_reaches_its_field(tmp_path):
    cohort = load_cohort(
        table(
            tmp_path,
            "slide_id,path,patient_id,mpp,split,roi,site,grade,note\n"
            "s1,slides/a b.svs,p1,0.25,train,roi/s1.geojson,north,3,\n"
            's2,/elsewhere/b.svs,p1,,,,,,"two, three"\n',
        )
    )
    first, second = cohort.rows
    assert first == SlideRow(
        slide_id="s1",
        path=tmp_path / "slides" / "a b.svs",
        patient_id="p1",
        columns={"grade": "3", "note": ""},
        mpp=0.25,
        split="train",
        roi=tmp_path / "roi" / "s1.geojson",
        site="north",
    )
    assert second.path == Path("/elsewhere/b.svs")
    assert (second.mpp, second.roi, second.columns["note"]) == (None, None, "two, three")
    assert cohort.patient_id_given
    assert cohort.columns == ("grade", "note")


def test_ids_and_labels_are_never_coerced(tmp_path):
    cohort = load_cohort(
        table(tmp_path, "slide_id,path,label\n007,a.svs,01\nNA,b.svs,True\n1e3,c.svs, 1.0 \n")
    )
    assert [row.slide_id for row in cohort.rows] == ["007", "NA", "1e3"]
    assert [row.columns["label"] for row in cohort.rows] == ["01", "True", " 1.0 "]
    assert not cohort.patient_id_given
    assert [row.patient_id for row in cohort.rows] == ["007", "NA", "1e3"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "\ufeffslide_id,path\r\ns1,a.svs\r\n"),
        ("a.csv", "slide_id;path\ns1;a.svs\n"),
        ("a.tsv", "slide_id\tpath\ns1\ta.svs"),
        ("a.txt", "slide_id\tpath\ns1\ta.svs\n"),
        ("a.csv", "slide_id,path,\ns1,a.svs,\n,,\n\n"),
        ("a.csv", " slide_id , path \n s1 , a.svs \n"),
    ],
)
def test_tables_as_people_save_them(tmp_path, name, text):
    cohort = load_cohort(table(tmp_path, text, name))
    assert [(row.slide_id, row.path) for row in cohort.rows] == [("s1", tmp_path / "a.svs")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Slide ID,path\ns1,a\n", ["no column 'slide_id'", "rename 'Slide ID'"]),
        ("slide_id,file\ns1,a\n", ["no column 'path'", "there are: slide_id, file"]),
        ("slide_id,path\ns1,a\ns1,b\n", ["row 3, column slide_id: 's1'", "row 2 already"]),
        ("slide_id,path\ns1,a\nS1,b\n", ["row 3, column slide_id: 'S1'", "'s1' in row 2", "case"]),
        ("slide_id,path\na/b,a\n", ["row 2, column slide_id: 'a/b' contains '/'"]),
        ("slide_id,path\n,a\n", ["row 2, column slide_id: ''", "is empty"]),
        ("slide_id,path\ns1,\n", ["row 2, column path: is empty"]),
        ("slide_id,path\ns1,s3://b/a.svs\n", ["row 2, column path: 's3://b/a.svs'"]),
        ("slide_id,path,mpp\ns1,a,0\n", ["row 2, column mpp: '0'", "0.08-25"]),
        ("slide_id,path,mpp\ns1,a,-0.5\n", ["row 2, column mpp: '-0.5'"]),
        ("slide_id,path,mpp\ns1,a,250\n", ["row 2, column mpp: '250'"]),
        ("slide_id,path,mpp\ns1,a,nan\n", ["row 2, column mpp: 'nan'"]),
        ("slide_id,path,mpp\ns1,a,forty\n", ["'forty' is not a number"]),
        ('slide_id,path,mpp\ns1,a,"0,25"\n', ["'0,25' is not a number; write it with a point"]),
        ("slide_id,path\ns1,a,b\n", ["row 2 has 3 cells, the header 2", "'b'"]),
        ("slide_id,path,path\ns1,a,b\n", ["column 'path' stands there 2 times"]),
        ("slide_id,path,\ns1,a,b\n", ["row 2 has the value 'b' in a column without name"]),
        ("slide_id,path\n", ["no rows"]),
        ("", ["no header"]),
        ('slide_id,path\ns1,"a\n', ["quotation marks"]),
        ("slide_id,path\ns1,a\0b\n", ["zero byte at offset 18"]),
    ],
)
def test_each_fault_is_named_with_its_place(tmp_path, text, parts):
    message = refusal(table(tmp_path, text))
    assert message.startswith(str(tmp_path / "cohort.csv"))
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_row_numbers_are_those_of_a_spreadsheet(tmp_path):
    text = 'slide_id,path,note\ns1,a,"two\nlines"\n\ns2,b,\ns3,,\n'
    assert "row 5, column path" in refusal(table(tmp_path, text))


def test_all_faults_are_listed_up_to_twenty(tmp_path):
    rows = "".join(f"s{i},a.svs,0\n" for i in range(30))
    message = refusal(table(tmp_path, "slide_id,path,mpp\n" + rows))
    assert "30 problems" in message
    assert message.count("column mpp") == 20
    assert "and 10 more" in message
    message = refusal(table(tmp_path, "slide_id,path,mpp\ns/1,,0\n"))
    for part in ("column slide_id", "column path", "column mpp"):
        assert part in message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_by_its_byte(tmp_path, mark):
    path = tmp_path / "c.csv"
    content = mark + b"slide_id,path\ns1,a.svs\nM\xfcller,b.svs\n"
    path.write_bytes(content)
    message = refusal(path)
    assert f"byte 0xfc at offset {content.index(0xFC)}, about row 3" in message
    assert "UTF-8" in message
    path.write_bytes("slide_id,path\n".encode("utf-16"))
    assert "UTF-16" in refusal(path)


def test_things_that_are_no_table(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone.csv")
    (tmp_path / "notes.docx").write_text("x")
    assert "'.docx'" in refusal(tmp_path / "notes.docx")
    for suffix in ("parquet", "xlsx"):
        (tmp_path / f"a.{suffix}").write_text("x")
        assert "can't be read as" in refusal(tmp_path / f"a.{suffix}")


def test_missing_slides_are_listed_not_refused(tmp_path):
    (tmp_path / "a.svs").touch()
    cohort = load_cohort(table(tmp_path, "slide_id,path\ns1,a.svs\ns2,b.svs\n"))
    assert [row.slide_id for row in missing_paths(cohort)] == ["s2"]


def test_doubtful_labels_and_columns_are_noted(tmp_path):
    cohort = load_cohort(
        table(
            tmp_path,
            "slide_id,path,patient_id,Site,label\n"
            "s1,a,p1,x,tumor\ns2,b,,x,Tumor\ns3,c,p1,x,tumor \ns4,d,p1,x,normal\n",
        )
    )
    notes = "\n".join(cohort.notes)
    assert "'Site' is taken as a label; for site" in notes
    assert "both 'tumor' (1 row) and 'Tumor' (1)" in notes
    assert "patient_id is empty in row 3" in notes


# --- Parquet and XLSX -----------------------------------------------------------------------


def test_parquet_is_read_as_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "c.parquet"
    columns = {
        "slide_id": ["007", "b"],
        "path": ["a.svs", "b.svs"],
        "mpp": [0.25, None],
        "grade": [3, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    rows = load_cohort(path).rows
    assert [(r.slide_id, r.mpp, r.columns["grade"]) for r in rows] == [
        ("007", 0.25, "3"),
        ("b", None, ""),
    ]


def test_xlsx_is_read_as_it_is_shown(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["slide_id", "path", "mpp", "label"])
    sheet.append(["007", "a.svs", 0.5, "1"])
    sheet.append([8, "b.svs", None, True])
    sheet["A3"].number_format = "000"
    sheet.append(["c", "c.svs", 99, None])
    book.create_sheet("notes")
    path = tmp_path / "c.xlsx"
    book.save(path)
    assert "row 4, column mpp: '99'" in refusal(path)
    sheet["C4"] = None
    book.save(path)
    cohort = load_cohort(path)
    assert [(r.slide_id, r.mpp, r.columns["label"]) for r in cohort.rows] == [
        ("007", 0.5, "1"),
        ("008", None, "TRUE"),
        ("c", None, ""),
    ]
    assert "first of 2 sheets" in cohort.notes[0]


def test_xlsx_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "c.xlsx").touch()
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    assert "pip install 'bagscope[xlsx]'" in refusal(tmp_path / "c.xlsx")


# --- clinical data --------------------------------------------------------------------------


def test_labels_are_joined_by_patient_and_the_unmatched_listed(tmp_path):
    slides = table(tmp_path, "slide_id,path,patient_id\ns1,a,p1\ns2,b,p1\ns3,c,p2\ns4,d,p9\n")
    clinical = table(tmp_path, "patient_id,grade\np1,3\np2,1\np5,2\n", "clinical.csv")
    cohort = load_cohort(slides, labels=clinical)
    assert [row.columns["grade"] for row in cohort.rows] == ["3", "3", "1", ""]
    assert cohort.columns == ("grade",)
    assert any(n.startswith("s4: in the cohort, but not in clinical.csv") for n in cohort.notes)
    assert any("p5 not in the cohort" in n for n in cohort.notes)


def test_labels_may_name_slides_instead(tmp_path):
    slides = table(tmp_path, "slide_id,path,patient_id\ns1,a,p1\ns2,b,p1\n")
    clinical = table(tmp_path, "slide_id,grade\ns2,1\ns1,3\n", "clinical.csv")
    assert [r.columns["grade"] for r in load_cohort(slides, labels=clinical).rows] == ["3", "1"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("grade\n3\n", "no column 'patient_id'"),
        ("patient_id,grade\np1,3\np1,4\n", "row 3, column patient_id: 'p1' stands in row 2"),
        ("patient_id,grade\n,3\n", "row 2, column patient_id: is empty"),
        ("patient_id,path\np1,x\n", "column 'path' stands in the cohort table too"),
        ("patient_id,stain\np1,x\n", "column 'stain' stands in the cohort table too"),
    ],
)
def test_labels_that_cannot_be_joined(tmp_path, text, part):
    slides = table(tmp_path, "slide_id,path,patient_id,stain\ns1,a,p1,he\n")
    message = refusal(slides, labels=table(tmp_path, text, "clinical.csv"))
    assert message.startswith(str(tmp_path / "clinical.csv"))
    assert part in message


def test_equal_repetitions_in_labels_are_no_fault(tmp_path):
    slides = table(tmp_path, "slide_id,path\ns1,a\n")
    clinical = table(tmp_path, "patient_id,grade\ns1,3\ns1,3\n", "clinical.csv")
    cohort = load_cohort(slides, labels=clinical)
    assert cohort.rows[0].columns["grade"] == "3"
    assert any("joined by slide_id" in note for note in cohort.notes)


# --- writing --------------------------------------------------------------------------------

words = st.text(string.ascii_letters + string.digits + "äµ _-.", min_size=1, max_size=12)
ids = words.filter(lambda name: portable_name_problem(name) is None)
values = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path, data):
    slide_ids = data.draw(st.lists(ids, min_size=1, max_size=5, unique_by=str.casefold))
    given = data.draw(st.booleans())
    rows = tuple(
        SlideRow(
            slide_id=slide_id,
            path=tmp_path / data.draw(ids) / data.draw(ids),
            patient_id=data.draw(ids) if given else slide_id,
            columns={"label": data.draw(values)},
            mpp=data.draw(st.none() | st.floats(0.08, 25)),
            split=data.draw(st.sampled_from(["", "train"])),
            roi=data.draw(st.none() | st.just(tmp_path / "roi" / "a.geojson")),
            site=data.draw(st.sampled_from(["", "x"])),
        )
        for slide_id in slide_ids
    )
    cohort = Cohort(rows=rows, source="", columns=("label",), patient_id_given=given)
    path = tmp_path / "written" / "cohort.csv"
    write_cohort_csv(cohort, path)
    back = load_cohort(path)
    assert back.patient_id_given == given
    assert back.columns == cohort.columns
    for old, new in zip(rows, back.rows, strict=True):
        assert new.path.parent.parent.resolve() == old.path.parent.parent
        assert (new.path.name, new.path.parent.name) == (old.path.name, old.path.parent.name)
        fields = ("slide_id", "patient_id", "columns", "mpp", "split", "site")
        assert all(getattr(new, f) == getattr(old, f) for f in fields)
    with path.open(newline="", encoding="utf-8") as handle:
        assert all(not Path(line["path"]).is_absolute() for line in csv.DictReader(handle))


def test_a_written_path_leads_there_through_linked_folders_too(tmp_path):
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").touch()
    (tmp_path / "study").symlink_to(tmp_path / "store" / "deep")
    cohort = load_cohort(tmp_path / "slides")
    write_cohort_csv(cohort, tmp_path / "study" / "cohort.csv")
    assert missing_paths(load_cohort(tmp_path / "study" / "cohort.csv")) == []
