"""Flags beat the environment, which beats the file; whatever is unknown stops the start."""

from pathlib import Path

import pytest

from lockstep.daemon.flags import (
    Flag,
    FlagError,
    byte_size,
    choice,
    float_between,
    on_off,
    parse_flags,
    positive_int,
    tcp_port,
)

FLAGS = [
    Flag("max-num-seqs", positive_int, 256, "most requests in a batch"),
    Flag("prefix-cache", on_off, False, "share prompt blocks"),
]


def test_defaults_apply_when_nothing_is_given() -> None:
    assert parse_flags("p", FLAGS, [], {}) == {
        "max_num_seqs": 256,
        "prefix_cache": False,
    }


def test_a_flag_with_a_bare_meaning_may_stand_alone() -> None:
    flags = [*FLAGS, Flag("http", str, None, "gateway", "on")]
    for argv, value in (
        ([], None),
        (["--http"], "on"),
        (["--http", "--max-num-seqs", "3"], "on"),
        (["--http", "127.0.0.1:1"], "127.0.0.1:1"),
    ):
        assert parse_flags("p", flags, argv, {})["http"] == value
    assert parse_flags("p", flags, [], {"LOCKSTEP_HTTP": "off"})["http"] == "off"


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("max-num-seqs = 3\nprefix_cache = true\n")
    env = {"LOCKSTEP_MAX_NUM_SEQS": "2"}
    argv = ["--config", str(config)]
    assert parse_flags("p", FLAGS, argv, {})["max_num_seqs"] == 3
    assert parse_flags("p", FLAGS, argv, env) == {
        "max_num_seqs": 2,
        "prefix_cache": True,
    }
    assert parse_flags("p", FLAGS, [*argv, "--max-num-seqs", "1"], env)["max_num_seqs"] == 1


@pytest.mark.parametrize(
    ("argv", "env", "named"),
    [
        (["--max-num-seq", "1"], {}, "--max-num-seq"),
        (["--max-num-seqs", "none"], {}, "'none'"),
        (["--max-num-seqs", "0"], {}, "at least 1"),
        ([], {"LOCKSTEP_MAX_NUM_SEQS": "-1"}, "LOCKSTEP_MAX_NUM_SEQS"),
        ([], {"LOCKSTEP_MAX_SEQS": "1"}, "LOCKSTEP_MAX_SEQS"),
        (["--config", "/nonexistent.toml"], {}, "nonexistent"),
    ],
)
def test_bad_setting_is_refused_by_name(argv: list[str], env: dict[str, str], named: str) -> None:
    with pytest.raises(FlagError, match=named):
        parse_flags("p", FLAGS, argv, env)


def test_unknown_setting_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("max_sequences = 3\n")
    with pytest.raises(FlagError, match="max_sequences"):
        parse_flags("p", FLAGS, ["--config", str(config)], {})


def test_settings_of_other_daemons_may_stand_in_the_environment() -> None:
    env = {"LOCKSTEP_STEP_TIMEOUT": "3"}
    parsed = parse_flags("p", FLAGS, [], env, known_elsewhere=frozenset({"step-timeout"}))
    assert "step_timeout" not in parsed


def test_parsers_name_what_they_want() -> None:
    assert byte_size("2G") == 2 * 2**30
    assert byte_size("17") == 17
    assert float_between(0, 1)("0.5") == 0.5
    for parse, text in [
        (byte_size, "2x"),
        (float_between(0, 1), "nan"),
        (tcp_port, "65536"),
    ]:
        with pytest.raises(ValueError, match="want"):
            parse(text)


def test_help_shows_defaults_and_choices_as_one_types_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        *FLAGS,
        Flag("comm", choice("shm", "gloo"), "shm", "how ranks talk"),
        Flag("step-timeout", float_between(0, 60), 30.0, "seconds"),
        Flag("ready-file", str, "", "file to write"),
    ]
    with pytest.raises(SystemExit):
        parse_flags("p", flags, ["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    assert "--prefix-cache {on,off} share prompt blocks (default: off)" in shown
    assert "--comm {shm,gloo} how ranks talk (default: shm)" in shown
    assert "--step-timeout N seconds (default: 30)" in shown
    assert shown.endswith("file to write")
