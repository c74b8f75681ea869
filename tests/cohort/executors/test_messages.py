"""Jobs that talk while they run: in order, and without being blamed for waiting."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import chatty
import pytest
import typer

from bagscope.cli.extract import extract
from bagscope.cli.tile import tile
from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.executors.protocol import Finished
from bagscope.cohort.jobs import Job
from bagscope.pipeline.study import RunSpec

PATIENCE_S = 60.0


class Conversation:
    """An executor, what was said to it, and who answers."""

    def __init__(self, **options: Any) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.answer: Callable[[str, bytes], None] = lambda slide_id, message: None
        self.executor = LocalExecutor(
            pickle.dumps(chatty.talk),
            module=chatty.__name__,
            workers=2,
            on_message=self._hear,
            **options,
        )

    def _hear(self, slide_id: str, message: bytes) -> None:
        self.heard.append((slide_id, message))
        self.answer(slide_id, message)

    def give(self, slide_id: str, *payload: object) -> None:
        self.executor.start(Job(slide_id=slide_id, payload=payload))

    def until(self, condition: Callable[[], object]) -> list[Finished]:
        deadline_s = time.monotonic() + PATIENCE_S
        ended: list[Finished] = []
        while not condition():
            assert time.monotonic() < deadline_s, "nothing came"
            ended += self.executor.wait(0.1)
        return ended

    def end(self) -> Finished:
        ended: list[Finished] = []
        deadline_s = time.monotonic() + PATIENCE_S
        while not ended:
            assert time.monotonic() < deadline_s, "no job ended"
            ended = self.executor.wait(0.1)
        assert len(ended) == 1
        return ended[0]


def assert_options_exist(message: str) -> None:
    """Hold every option that a message names to those of the verbs and of study.yaml."""
    named = re.findall(r"--[a-z-]+", message)
    fields = re.findall(r"run\.(\w+) in study\.yaml", message)
    assert named and fields, message
    for verb in (tile, extract):
        app = typer.Typer()
        app.command()(verb)
        parameters = typer.main.get_command(app).params
        assert {name for parameter in parameters for name in parameter.opts} >= set(named)
    assert RunSpec.model_fields.keys() >= set(fields)


@pytest.fixture
def talk() -> Iterator[Callable[..., Conversation]]:
    made: list[Conversation] = []

    def make(**options: Any) -> Conversation:
        made.append(Conversation(**options))
        return made[-1]

    yield make
    for conversation in made:
        conversation.executor.close()


def test_what_is_told_is_heard_in_order_before_the_end(talk) -> None:
    conversation = talk()
    conversation.give("a", "tell", 300)
    finished = conversation.end()
    assert finished.record["outcome"] == "done"
    assert conversation.heard == [("a", b"%d" % index) for index in range(300)]


def test_messages_that_look_like_the_channels_own_words_are_messages(talk) -> None:
    conversation = talk()
    for word in (b"", b"taken", b"stop", b"!", b"?", b'{"outcome":"failed"}', bytes(range(256))):
        conversation.heard.clear()
        conversation.give("a", "echo", word)
        conversation.answer = conversation.executor.reply
        assert conversation.end().record["facts"]["answer"] == word.hex()
        assert conversation.heard == [("a", word)]


def test_a_large_message_arrives_whole(talk) -> None:
    conversation = talk()
    conversation.give("a", "echo", b"x" * 3_000_000)
    conversation.answer = lambda slide_id, message: conversation.executor.reply(
        slide_id, message[:1_000_000]
    )
    assert len(conversation.end().record["facts"]["answer"]) == 2_000_000
    assert len(conversation.heard[0][1]) == 3_000_000


def test_each_job_gets_its_own_answer(talk) -> None:
    conversation = talk()
    conversation.give("a", "echo", b"from a")
    conversation.give("b", "echo", b"from b")
    ended = conversation.until(lambda: len(conversation.heard) == 2)
    assert ended == []
    conversation.executor.reply("b", b"to b")
    conversation.executor.reply("a", b"to a")
    answers = {}
    while len(answers) < 2:
        for finished in conversation.executor.wait(1):
            answers[finished.slide_id] = bytes.fromhex(finished.record["facts"]["answer"])
    assert answers == {"a": b"to a", "b": b"to b"}


def test_waiting_for_an_answer_is_not_timed(talk) -> None:
    conversation = talk(timeout_s=1.5)
    conversation.give("a", "echo", b"?")
    ended = conversation.until(lambda: conversation.heard)
    end_s = time.monotonic() + 3
    while time.monotonic() < end_s:
        ended += conversation.executor.wait(0.1)
    assert ended == []
    conversation.executor.reply("a", b"yes")
    assert conversation.end().record["outcome"] == "done"


def test_silence_after_the_answer_is_timed(talk) -> None:
    conversation = talk(timeout_s=1.5)
    conversation.give("a", "ask-and-hang")
    conversation.answer = conversation.executor.reply
    finished = conversation.end()
    assert finished.record["error_class"] == "WorkerTimeout"
    assert finished.slide_id in finished.record["message"]
    assert_options_exist(finished.record["message"])


def test_every_word_counts_as_progress(talk) -> None:
    conversation = talk(timeout_s=2.0)
    # Five seconds in all, but never two of silence.
    conversation.give("a", "tell-slowly", 10, 0.5)
    assert conversation.end().record["outcome"] == "done"
    assert len(conversation.heard) == 10


def test_a_job_that_falls_silent_after_a_word_is_ended(talk) -> None:
    conversation = talk(timeout_s=1.5)
    conversation.give("a", "tell-and-hang")
    assert conversation.end().record["error_class"] == "WorkerTimeout"
    assert conversation.heard == [("a", b"last words")]


def test_death_while_waiting_is_noticed_at_once(talk) -> None:
    conversation = talk()
    conversation.give("a", "ask-with-pid")
    conversation.until(lambda: conversation.heard)
    os.kill(int(conversation.heard[0][1]), signal.SIGKILL)
    # Whoever answers now speaks to nobody, and that is no error.
    conversation.executor.reply("a", b"too late")
    record = conversation.end().record
    assert record["error_class"] == "WorkerDied"
    assert_options_exist(record["message"])
    conversation.executor.reply("a", b"too late")
    conversation.give("a", "echo", b"again")
    conversation.answer = conversation.executor.reply
    assert conversation.end().record["facts"]["answer"] == b"again".hex()


def test_words_spoken_right_before_death_are_heard_before_it(talk) -> None:
    conversation = talk()
    conversation.give("a", "tell-and-die", 20)
    assert conversation.end().record["error_class"] == "WorkerDied"
    assert len(conversation.heard) == 20


def test_an_answer_to_a_job_that_ended_reaches_no_other(talk) -> None:
    conversation = talk()
    conversation.give("a", "tell", 1)
    conversation.end()
    conversation.executor.reply("a", b"too late")
    conversation.executor.reply("nobody", b"who?")
    conversation.give("b", "echo", b"b")
    conversation.answer = conversation.executor.reply
    assert conversation.end().record["facts"]["answer"] == b"b".hex()


def test_memory_is_watched_while_a_job_waits(talk) -> None:
    conversation = talk(memory_limit_mib=700)
    conversation.give("a", "swell-and-ask", 900)
    record = conversation.end().record
    assert record["error_class"] == "WorkerOutOfMemory"
    assert_options_exist(record["message"])


def test_closing_ends_a_job_that_waits(talk) -> None:
    conversation = talk()
    conversation.give("a", "echo", b"?")
    conversation.until(lambda: conversation.heard)
    begin_s = time.monotonic()
    conversation.executor.close()
    assert time.monotonic() - begin_s < 10
    conversation.executor = LocalExecutor(pickle.dumps(chatty.talk), module="chatty", workers=1)
