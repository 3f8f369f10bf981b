"""What looks like a secret goes, what is needed to understand a fault stays."""

import pytest

from lockstep.redact import REMOVED, Redactor, is_secret_name

SECRET = "s3cr3t-Value/42"


@pytest.mark.parametrize(
    "line",
    [
        f"LOCKSTEP_API_KEY={SECRET}",
        f"api_key: '{SECRET}'",
        f'{{"password": "{SECRET}", "port": 1}}',
        f"lockstep coordinator --auth-token {SECRET} --port 1",
        f"lockstep coordinator --api-key={SECRET}",
        f"authorization: Bearer {SECRET}",
        f"metadata Bearer {SECRET}",
        f"https://user:{SECRET}@host/path",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET} cut",
        f"HF_TOKEN={SECRET}",
        "a hf_abcdefghijklmnop here",
    ],
)
def test_a_secret_goes(line: str) -> None:
    cleaned = Redactor().clean(line)
    assert SECRET not in cleaned and "hf_abc" not in cleaned
    assert REMOVED in cleaned


@pytest.mark.parametrize(
    "line",
    [
        'lockstep_generation_tokens_total{model_name="m"} 12.0',
        "LOCKSTEP_MAX_BATCH_TOKENS=2048",
        '"has_tokenizer": true, "eos_token_ids": [0, 2]',
        "--max-queue-prompt-tokens 1048576",
        "lockstep simulate --token-text ascii",
        "rank 1 lost at step 12: its step stream broke: UNAVAILABLE Stream removed",
        "http://127.0.0.1:9851/metrics",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert Redactor().clean(line) == line


def test_the_name_of_a_secret_stays() -> None:
    cleaned = Redactor().clean(f"LOCKSTEP_API_KEY={SECRET}\nPORT=1")
    assert cleaned == f"LOCKSTEP_API_KEY={REMOVED}\nPORT=1"


def test_a_known_value_goes_wherever_it_stands() -> None:
    redactor = Redactor()
    redactor.learn({"MY_PASSWORD": "horse", "MY_PORT": "50051"})
    redactor.learn_values(["abc"])  # too short to be told from words
    assert redactor.clean("horses on 50051 abc") == f"{REMOVED}s on 50051 abc"


def test_names_of_secrets() -> None:
    assert all(
        map(is_secret_name, ("HF_TOKEN", "api-key", "db.passwd", "CLIENT_SECRET_2", "TOKEN_2"))
    )
    assert not any(map(is_secret_name, ("max_batch_tokens", "token_ids", "port", "keys")))
