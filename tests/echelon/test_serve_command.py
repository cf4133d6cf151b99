"""What `echelon serve` refuses before it loads anything."""

from pathlib import Path

import pytest

from echelon.cli import BAD_INPUT, main, parse
from echelon.commands.serve import in_positions, settings_of


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text, mode in (("open.key", "sixteen-characters", 0o644), ("short.key", "x", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    (tmp_path / "reward.json").write_text('{"timeout": 3}')
    return tmp_path


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines: it needs --api-key-file"),
        ("--host example.org --admin-key-file {files}/open.key", "it needs --api-key-file"),
        ("--api-key-file {files}/none.key", "none.key cannot be read: No such file or directory"),
        ("--api-key-file {files}/open.key", "open.key can be read by others: chmod 600 it"),
        ("--admin-key-file {files}/short.key", "short.key holds no key: expected one word of at least 16"),
        ("--port 65536", "--port: Expected `int` <= 65535"),
        ("--drain-s -1", "--drain-s: Expected `float` >= 0"),
        ("--max-sequences 0", "--max-sequences: Expected `int` >= 1"),
        ("--draft-tokens 65", "--draft-tokens: Expected `int` <= 64"),
        ("--reward-config {files}/none.json", "none.json: "),
        ("--reward-config {files}/reward.json", "unknown field `timeout`"),
        ("--sleep", "unknown argument '--sleep'"),
    ],
)
def test_one_line_says_what_is_wrong(files: Path, capsys: pytest.CaptureFixture[str], words: str, reason: str) -> None:
    try:
        code = main(["serve", "org/model", *words.format(files=files).split()])
    except SystemExit as left:
        code = int(str(left.code))
    error = capsys.readouterr().err
    assert code == BAD_INPUT
    assert reason in error
    assert error.count("\n") == 1


def test_options_become_settings(files: Path) -> None:
    reward = f"{files}/rewards.py:ones"
    words = ["serve", str(files), "--draft", "marginal", "--draft-tokens", "8", "--graphs", "--reward", reward]
    config = settings_of(parse([*words, "--dtype", "bfloat16", "--context-tokens", "512"]))
    assert (config.model, config.served_name) == (str(files.resolve()), str(files))
    assert (config.draft.policy, config.draft.max_tokens) == ("marginal", 8)
    assert (config.rollout.dtype, config.rollout.context_tokens, config.rollout.enforce_eager) == (
        "bfloat16",
        512,
        False,
    )
    assert config.functions == {"ones": reward}
    assert (config.host, config.api_key_file, config.admin_key_file) == ("127.0.0.1", None, None)


@pytest.mark.parametrize(("asked", "context"), [(None, 512), (512, 512), (100, 100)])
def test_context_is_what_the_model_has(tiny_model: Path, asked: int | None, context: int) -> None:
    words = [] if asked is None else ["--context-tokens", str(asked)]
    config = in_positions(settings_of(parse(["serve", str(tiny_model), *words])), asked)
    assert config.rollout.context_tokens == context


def test_no_more_context_than_the_model_has(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_model), "--context-tokens", "513"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert f"--context-tokens is 513, but {tiny_model} has 512 positions: lower it" in error
    assert error.count("\n") == 1
