"""Splits: laws that hold for every cohort, method by method."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from bagscope.errors import CohortError, ConfigError
from bagscope.mil.cases import CaseTable
from bagscope.mil.splits import Split, SplitSpec, check_splits, make_splits
from bagscope.mil.splits.files import write_splits
from bagscope.mil.targets import TargetSpec
from bagscope.specs import parse_spec
from tests.mil.splits.tables import GRADE, graded, table_of

Rows = list[dict[str, str]]


@st.composite
def cohorts(draw: st.DrawFn, least: int = 5) -> Rows:
    """Cohorts of two or three grades, patients with one to three slides, three sites."""
    rows = []
    for grade in draw(st.sampled_from(["ab", "abc"])):
        for i in range(draw(st.integers(least, least + 12))):
            site = draw(st.sampled_from(["north", "south", "west"]))
            for j in range(draw(st.integers(1, 3))):
                rows.append(
                    {
                        "slide_id": f"{grade}{i}-{j}",
                        "patient_id": f"{grade}{i}",
                        "grade": grade,
                        "site": site,
                    }
                )
    return rows


SPECS = st.one_of(
    st.builds(
        SplitSpec, folds=st.integers(2, 5), repeats=st.integers(1, 2), seed=st.integers(0, 9)
    ),
    st.builds(
        SplitSpec,
        method=st.just("monte_carlo"),
        repeats=st.integers(1, 3),
        test_share=st.floats(0.1, 0.5),
        val_share=st.floats(0.1, 0.5),
        seed=st.integers(0, 9),
    ),
)


def patients(table: CaseTable, case_ids: tuple[str, ...]) -> set[str]:
    return {case.patient_id for case in table.chosen(case_ids)}


def grades(table: CaseTable, case_ids: tuple[str, ...]) -> Counter[str]:
    return Counter(patient_id[0] for patient_id in patients(table, case_ids))


def each_tested_once(table: CaseTable, splits: tuple[Split, ...]) -> bool:
    tested = Counter(case_id for split in splits for case_id in split.test)
    return tested == Counter(case.case_id for case in table.cases)


@settings(max_examples=40)
@given(cohorts(), SPECS)
def test_no_patient_parts_and_every_case_has_one_side(rows: Rows, spec: SplitSpec) -> None:
    table = table_of(rows)
    plan = make_splits(table, spec)
    assert not check_splits(plan, table)
    for split in plan.splits:
        sides = [patients(table, case_ids) for _, case_ids in split.sides()]
        assert sum(map(len, sides)) == len(frozenset().union(*sides)) == len(table.patient_ids)
        placed = sorted([*split.train, *split.val, *split.test])
        assert placed == sorted(case.case_id for case in table.cases)
    for repeat in {split.repeat for split in plan.splits}:
        if spec.method == "kfold":
            assert each_tested_once(table, tuple(s for s in plan.splits if s.repeat == repeat))


@settings(max_examples=40)
@given(cohorts(), st.integers(2, 5), st.integers(0, 99))
def test_every_fold_has_its_share_of_every_class(rows: Rows, folds: int, seed: int) -> None:
    table = table_of(rows)
    whole = grades(table, tuple(case.case_id for case in table.cases))
    splits = make_splits(table, SplitSpec(folds=folds, seed=seed)).splits
    for split in splits:
        tested = grades(table, split.test)
        for grade, count in whole.items():
            assert abs(tested[grade] - count / folds) < 1
    sizes = [len(patients(table, split.test)) for split in splits]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40)
@given(cohorts(), st.floats(0.05, 0.6), st.floats(0.05, 0.6))
def test_drawn_shares_are_within_one_patient(rows: Rows, test: float, val: float) -> None:
    table = table_of(rows)
    spec = SplitSpec(method="monte_carlo", repeats=2, test_share=test, val_share=val)
    whole = grades(table, tuple(case.case_id for case in table.cases))
    for split in make_splits(table, spec).splits:
        rest = whole - grades(table, split.test)
        for counts, among, share in (
            (grades(table, split.test), whole, test),
            (grades(table, split.val), rest, val),
        ):
            for grade, count in among.items():
                # Half a patient more, as the whole is a whole number of patients.
                assert abs(counts[grade] - share * count) <= 1.5
                assert counts[grade] or count < 2
            assert all(among[grade] > counts[grade] for grade in among)


@settings(max_examples=25)
@given(cohorts(), SPECS, st.randoms(use_true_random=False))
def test_the_order_of_the_table_does_not_matter(
    rows: Rows, spec: SplitSpec, rng: random.Random
) -> None:
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert make_splits(table_of(rows), spec) == make_splits(table_of(shuffled), spec)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path) -> None:
    rows = graded({"a": 20, "b": 11}, slides=2)
    for name, order, seed in (("one", 1, 7), ("two", -1, 7), ("three", 1, 8)):
        spec = SplitSpec(seed=seed, repeats=2)
        write_splits(make_splits(table_of(rows[::order]), spec), tmp_path / f"{name}.csv")
    one, two, three = ((tmp_path / f"{n}.csv").read_bytes() for n in ("one", "two", "three"))
    assert one == two
    assert one != three
    settings_of = [(tmp_path / f"{n}.json").read_bytes() for n in ("one", "two")]
    assert settings_of[0] == settings_of[1]


def test_repeats_differ() -> None:
    plan = make_splits(table_of(graded({"a": 20, "b": 20})), SplitSpec(repeats=3))
    assert [split.name for split in plan.splits][4:6] == ["r0_f4", "r1_f0"]
    assert len({split.test for split in plan.splits}) == 15


def test_patients_meet_by_chance_alone() -> None:
    # A pair of patients of one class shares a fold about as often as scikit-learn lets them.
    rows = graded({"a": 10, "b": 10})
    plan = make_splits(table_of(rows), SplitSpec(repeats=400))
    ours = sum({"a0-0", "a1-0"} <= set(split.test) for split in plan.splits)
    labels = [row["grade"] for row in rows]
    theirs = 0
    for seed in range(400):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(labels, labels)
        theirs += sum({0, 1} <= set(test.tolist()) for _, test in folds)
    # Binomial with p = 1/9: sd of the difference of two counts is about 9.
    assert abs(ours - 400 / 9) < 25
    assert abs(ours - theirs) < 36


def test_per_patient_cases_are_patients() -> None:
    table = table_of(graded({"a": 6, "b": 6}, slides=3), per="patient")
    plan = make_splits(table, SplitSpec(folds=3))
    assert each_tested_once(table, plan.splits)
    assert plan.case_ids == tuple(sorted(f"{g}{i}" for g in "ab" for i in range(6)))


def test_a_patient_with_slides_of_several_classes_counts_for_each() -> None:
    rows = graded({"a": 10, "b": 10})
    for i in range(3):
        rows.append({"slide_id": f"a{i}-x", "patient_id": f"a{i}", "grade": "b"})
    table = table_of(rows)
    plan = make_splits(table, SplitSpec())
    assert not check_splits(plan, table)
    mixed = [len(patients(table, split.test) & {"a0", "a1", "a2"}) for split in plan.splits]
    assert max(mixed) == 1  # rarer than folds, yet spread


# --- other targets --------------------------------------------------------------------------


def test_numbers_are_spread_by_quantiles() -> None:
    rows = [{"slide_id": f"s{i}", "size": str(i)} for i in range(100)]
    table = table_of(rows, TargetSpec(column="size", task="regression"))
    for split in make_splits(table, SplitSpec()).splits:
        tenths = Counter(int(case_id[1:]) // 10 for case_id in split.test)
        assert tenths == Counter(dict.fromkeys(range(10), 2))


def test_survival_is_spread_by_event_and_time() -> None:
    rows = [
        {"slide_id": f"s{i}", "days": str(1 + i % 40), "died": str(int(i < 40))} for i in range(80)
    ]
    target = TargetSpec(task="survival", time="days", event="died")
    table = table_of(rows, target)
    for split in make_splits(table, SplitSpec()).splits:
        for outcome in (True, False):
            chosen = [int(c[1:]) for c in split.test if (int(c[1:]) < 40) == outcome]
            quarters = Counter((i % 40) // 10 for i in chosen)
            assert quarters == Counter(dict.fromkeys(range(4), 2))


def test_labels_side_by_side_are_spread_by_combination() -> None:
    marks = ["x", "x;y", "y", "-"] * 10 + ["z", "x;z", "y;z", "x;y;z", "z"]
    rows = [{"slide_id": f"s{i}", "marks": mark} for i, mark in enumerate(marks)]
    table = table_of(rows, TargetSpec(column="marks", task="multilabel"))
    plan = make_splits(table, SplitSpec())
    assert not check_splits(plan, table)
    for split in plan.splits:
        found = Counter(marks[int(case_id[1:])] for case_id in split.test)
        assert [found[mark] for mark in ("x", "x;y", "y", "-")] == [2, 2, 2, 2]
        assert sum("z" in marks[int(case_id[1:])] for case_id in split.test) == 1


def test_cases_without_the_first_label_are_spread_as_well() -> None:
    rows = graded({"a": 10, "b": 10, "": 10}, size="1")
    table = table_of(rows, (GRADE, TargetSpec(column="size", task="regression")))
    for split in make_splits(table, SplitSpec()).splits:
        assert sum(case_id.startswith(tuple("0123456789")) for case_id in split.test) == 2


def test_without_stratifying_classes_fall_as_they_may() -> None:
    table = table_of(graded({"a": 50, "b": 50}))
    spread = {
        stratify: [
            grades(table, split.test)["a"]
            for split in make_splits(table, SplitSpec(stratify=stratify)).splits
        ]
        for stratify in (True, False)
    }
    assert spread[True] == [10] * 5
    assert len(set(spread[False])) > 1


# --- sites ----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(cohorts())
def test_each_site_is_left_out_once(rows: Rows) -> None:
    table = table_of(rows)
    site_of = {row["slide_id"]: row["site"] for row in rows}
    sites = sorted(set(site_of.values()))
    try:
        plan = make_splits(table, SplitSpec(method="site_out"))
    except CohortError as error:
        # One site alone, or a class that only one site has.
        assert len(sites) < 2 or "has no patient of class" in str(error)
        return
    assert [split.site for split in plan.splits] == sites
    for split in plan.splits:
        assert set(split.test) == {s for s, site in site_of.items() if site == split.site}
    assert each_tested_once(table, plan.splits)


def test_a_site_of_one_class_is_tested_and_said() -> None:
    rows = graded({"a": 5, "b": 5}, site="north")
    rows += [
        {"slide_id": f"x{i}", "patient_id": f"x{i}", "grade": "a", "site": "south"}
        for i in range(3)
    ]
    rows += [
        {"slide_id": f"y{i}", "patient_id": f"y{i}", "grade": "ab"[i % 2], "site": "west"}
        for i in range(6)
    ]
    table = table_of(rows)
    plan = make_splits(table, SplitSpec(method="site_out"))
    assert any("r0_f1 (south), test" in note and "class b" in note for note in plan.notes)
    assert not check_splits(plan, table)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 8), min_size=30, max_size=60), st.integers(2, 4), st.integers(0, 3))
def test_no_site_is_in_two_folds(sites: list[int], folds: int, seed: int) -> None:
    rows = [
        {"slide_id": f"s{i}", "grade": "ab"[i % 2], "site": f"site{site}"}
        for i, site in enumerate(sites)
    ]
    table = table_of(rows)
    if len(set(sites)) < folds:
        with pytest.raises(CohortError, match=r"can't make|need several"):
            make_splits(table, SplitSpec(method="site_preserving", folds=folds))
        return
    try:
        plan = make_splits(table, SplitSpec(method="site_preserving", folds=folds, seed=seed))
    except CohortError as error:
        assert "train: has no patient of class" in str(error)
        return
    homes = [{sites[int(case_id[1:])] for case_id in split.test} for split in plan.splits]
    assert all(homes)
    assert sum(map(len, homes)) == len(set(sites))
    assert each_tested_once(table, plan.splits)


# --- refusals -------------------------------------------------------------------------------


def refusal(rows: Rows, target: TargetSpec = GRADE, **options) -> str:
    with pytest.raises(CohortError) as caught:
        make_splits(table_of(rows, target), SplitSpec(**options))
    return str(caught.value)


def test_a_class_of_fewer_patients_than_folds_is_named() -> None:
    sentence = refusal(graded({"a": 9, "b": 3}, slides=4))
    assert "column grade: class 'b' has 3 patients (b0, b1, b2)" in sentence
    assert "5 folds" in sentence
    assert "--folds 3" in sentence
    assert "class 'c' has 0 patients" in refusal(
        graded({"a": 9, "b": 9}), TargetSpec(column="grade", classes=("a", "b", "c"))
    )
    assert "two sides" in refusal(graded({"a": 9, "b": 1}), method="monte_carlo")


def test_rare_labels_side_by_side_are_no_reason_to_stop() -> None:
    marks = ["x", "-"] * 10 + ["y", "y"]
    rows = [{"slide_id": f"s{i}", "marks": mark} for i, mark in enumerate(marks)]
    table = table_of(rows, TargetSpec(column="marks", task="multilabel"))
    plan = make_splits(table, SplitSpec())
    assert any("class 'y' has 2 patients (s20, s21)" in note for note in plan.notes)
    assert not check_splits(plan, table)


def test_censored_alone_teaches_nothing() -> None:
    rows = [{"slide_id": f"s{i}", "days": str(i), "died": "0"} for i in range(30)]
    target = TargetSpec(task="survival", time="days", event="died")
    assert "column died: none of 30 patients had an event" in refusal(rows, target)


def test_patients_without_a_site_or_of_two_are_named() -> None:
    rows = graded({"a": 5, "b": 5}, slides=2, site="north")
    rows[0]["site"] = ""
    assert "(a0); fill it in" in refusal(rows, method="site_out")
    rows[0]["site"] = "south"
    assert "a0: north, south" in refusal(rows, method="site_preserving")
    assert "nothing can be left out" in refusal(
        graded({"a": 5, "b": 5}, site="north"), method="site_out"
    )


def test_too_few_patients_are_refused() -> None:
    rows = [{"slide_id": f"s{i}", "size": str(i)} for i in range(3)]
    sentence = refusal(rows, TargetSpec(column="size", task="regression"))
    assert "3 patients can't be divided into 5 folds" in sentence


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"method": "site_out", "folds": 3}, "folds"),
        ({"method": "kfold", "test_share": 0.3}, "test_share"),
        ({"method": "monte_carlo", "file": "a.csv"}, "file"),
        ({"method": "site_preserving", "repeats": 2}, "repeats"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(values: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=f"makes no use of {word}"):
        parse_spec(SplitSpec, values, where="options")


def test_a_small_class_still_teaches_and_chooses() -> None:
    table = table_of(graded({"a": 40, "b": 5}))
    for split in make_splits(table, SplitSpec()).splits:
        assert grades(table, split.train)["b"] == 3
        assert grades(table, split.val)["b"] == 1
    two = table_of(graded({"a": 40, "b": 2}))
    for split in make_splits(two, SplitSpec(folds=2)).splits:
        assert grades(two, split.train)["b"] == 1
        assert grades(two, split.val)["b"] == 0


def test_without_a_validation_share_there_is_none() -> None:
    plan = make_splits(table_of(graded({"a": 9, "b": 9})), SplitSpec(val_share=0))
    assert all(not split.val for split in plan.splits)
    assert not any("val" in note for note in plan.notes)


def test_thousands_of_patients_are_no_burden() -> None:
    table = table_of(graded({"a": 1800, "b": 1200}))
    spec = SplitSpec(repeats=1, folds=10)
    tested = [len(split.test) for split in make_splits(table, spec).splits]
    assert tested == [300] * 10
