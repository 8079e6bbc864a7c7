"""The command line: fast help, one line for an error, the exit status, and overrides."""

import importlib
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from capjax import cli
from capjax.errors import UserError

HEAVY = ("jax", "flax", "optax", "orbax", "grain", "numpy", "tensorstore", "sentencepiece", "PIL")


@pytest.fixture
def command(monkeypatch):
    """Replaces `capjax report` by a function; the rest of the command line is real."""

    def use(run, add_arguments=lambda parser: parser.add_argument("--workdir")):
        module = SimpleNamespace(add_arguments=add_arguments, run=run)
        monkeypatch.setattr(importlib, "import_module", lambda name: module)

    return use


def run_capjax(*args):
    return subprocess.run(
        [sys.executable, "-m", "capjax.cli", *args], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command_line", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_imports_nothing_heavy(command_line):
    script = (
        "import sys\nfrom capjax import cli\n"
        "try:\n    status = cli.main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert status in (0, None) and not heavy, (status, heavy)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *command_line], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
    assert "--verbose" in result.stdout


def test_help_answers_at_once():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_capjax("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of the processor, not of the wall: the other tests take turns with this one.
    assert min(seconds() for _ in range(5)) < 0.3


def test_every_example_names_its_command_and_parses():
    for name, command in cli.COMMANDS.items():
        module = importlib.import_module(f"capjax.commands.{name}")
        for example in command.examples:
            program, first, *rest = example.split()
            assert (program, first) == ("capjax", name)
            cli.parse(name, module, rest)


def test_the_version_is_the_package_version():
    result = run_capjax("--version")
    assert result.stdout.split() == ["capjax", importlib.import_module("capjax").__version__]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["name a command", "train"]),
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["--workdir=x"], ["unknown command --workdir=x"]),
        (["config"], ["list|show|diff", "capjax config --help"]),
        (["config", "lst"], ["invalid choice", "list"]),
        (["config", "show"], ["required", "name"]),
        (["config", "list", "--config.a=1"], ["config list takes no --config.a=1"]),
        (["config", "show", "x", "--config.a"], ["--config.a has no value"]),
        (["config", "show", "no_such_config_here"], ["no shipped config"]),
        (["train", "--config=x", "--workdir"], ["--workdir", "expected one argument"]),
        (["train", "--workdirr=x"], ["--workdirr=x", "did you mean --workdir?"]),
        (["train", "--confg.model.width=1"], ["--confg.model.width=1", "did you mean --config?"]),
        (["report", "--workdir=x", "--config.a=1"], ["capjax report reads no config"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(args, words, capfd):
    assert cli.main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("capjax: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_success_is_status_0(command):
    command(lambda args: None)
    assert cli.main(["report"]) == 0


def test_a_user_error_shows_its_traceback_only_when_asked(command, capfd):
    def run(args):
        raise UserError("width=3: expected a multiple of 8")

    command(run)
    assert cli.main(["report"]) == 2
    assert capfd.readouterr().err == "capjax: error: width=3: expected a multiple of 8\n"
    assert cli.main(["report", "--verbose"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.endswith("capjax: error: width=3: expected a multiple of 8\n")


def test_any_other_error_is_one_line_status_1_and_logged(command, capfd, tmp_path):
    def run(args):
        raise ValueError("first line\nsecond line")

    command(run)
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 1
    err = capfd.readouterr().err
    assert err == ("capjax: error: ValueError: first line (run with --verbose for the traceback)\n")
    log = (tmp_path / "error.log").read_text()
    assert "Traceback" in log
    assert "second line" in log
    assert cli.main(["--verbose", "report", f"--workdir={tmp_path / 'none'}"]) == 1
    assert "Traceback" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_interrupt_is_status_130(command, capfd):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["report"]) == 130
    assert capfd.readouterr().err == "capjax: error: interrupted\n"


def test_overrides_reach_a_command_with_a_config(command):
    seen = []

    def add_arguments(parser):
        parser.add_argument("--config")

    command(lambda args: seen.append((args.config, args.overrides)), add_arguments)
    line = ["report", "--config.a.b=1=2", "--config=c", "--config.d", "-3", "--config.e="]
    assert cli.main(line) == 0
    assert seen == [("c", ["a.b=1=2", "d=-3", "e="])]


def test_device_flags_may_stand_anywhere():
    module = importlib.import_module("capjax.commands.checkpoint")
    for line in (["--platform=cpu", "verify", "x"], ["verify", "x", "--platform", "cpu"]):
        assert cli.parse("checkpoint", module, line).platform == "cpu"
    assert cli.parse("checkpoint", module, ["verify", "x"]).platform is None


def test_a_closed_pipe_is_no_traceback():
    script = (
        "import sys\nfrom types import SimpleNamespace\nfrom capjax import cli\n"
        "def run(args):\n    print('x' * 1000000)\n"
        "cli.importlib.import_module = lambda name: SimpleNamespace(\n"
        "    run=run, add_arguments=lambda parser: None)\n"
        "sys.exit(cli.main(['report']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert err == b""
