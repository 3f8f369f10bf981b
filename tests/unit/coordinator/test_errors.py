"""Messages of errors that users and operators read."""

from pathlib import Path

from coordinator.errors import BadCheckpoint, BadRequest


def test_bad_request_names_field_value_and_limit() -> None:
    error = BadRequest("top_p", 1.5, "above 0 and at most 1")
    assert str(error) == "top_p is 1.5; it must be above 0 and at most 1"
    assert (error.field, error.value, error.limit) == ("top_p", 1.5, "above 0 and at most 1")


def test_what_is_bad_about_a_field_stands_before_its_name_and_is_no_part_of_it() -> None:
    error = BadRequest("stop", 17, "at most 16", "number of")
    assert str(error) == "number of stop is 17; it must be at most 16"
    assert (error.field, error.aspect) == ("stop", "number of")


def test_long_values_are_cut() -> None:
    assert "(10000 long)" in str(BadRequest("text", "x" * 10_000, "short"))
    assert len(str(BadRequest("text", "x" * 10_000, "short"))) < 150
    assert len(str(BadRequest("ids", list(range(10_000)), "few"))) < 150


def test_bad_checkpoint_names_the_file() -> None:
    assert str(BadCheckpoint(Path("/m/config.json"), "is broken")) == "/m/config.json: is broken"
