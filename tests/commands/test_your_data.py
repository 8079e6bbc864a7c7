"""docs/your-data.md is what is run: its commands, what it prints, and the layouts it names."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from capjax import cli
from capjax.data.layouts import LAYOUTS, parse_address

PAGE = (Path(__file__).parents[2] / "docs" / "your-data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def shell_commands() -> list[list[str]]:
    return [
        shlex.split(line)
        for language, block in BLOCKS
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
    ]


def comparable(text: str) -> set[str]:
    """The lines, but for numbers, names in quotation marks, bars and the width of columns."""
    text = re.sub(r'": "[^"]*"', '": ""', re.sub(r"[-+]?\d[\d.,:e]*", "0", text))
    return {" ".join(line.split()) for line in text.replace("#", "").splitlines()}


def test_every_command_on_the_page_is_one():
    for program, name, *rest in shell_commands():
        assert program == "capjax"
        cli.parse(name, importlib.import_module(f"capjax.commands.{name}"), rest)


def test_every_layout_is_on_the_page_and_every_address_is_one():
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert set(LAYOUTS) <= {layout for layout, _ in rows}
    for layout, address in rows:
        if layout in LAYOUTS:
            parsed = parse_address(address)
            assert parsed is not None, address
            assert parsed.layout == layout


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    printed = ""
    for language, block in BLOCKS:
        if language == "python" and block.startswith("# my_config.py"):
            (tmp_path / "my_config.py").write_text(block, "utf-8")
        elif language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True)
        elif language == "sh":
            printed = ""
            for line in block.replace("\\\n", " ").splitlines():
                _, *arguments = shlex.split(line)
                result = subprocess.run(
                    [sys.executable, "-m", "capjax.cli", *arguments],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                assert result.returncode == 0, result.stderr
                printed += result.stdout + result.stderr
            if "captions.jsonl" in block:
                printed += (tmp_path / "captions.jsonl").read_text("utf-8")
        elif language == "text":
            missing = comparable(block) - {"..."} - comparable(printed)
            assert not missing, f"not printed: {missing}\nbut:\n{printed}"
    lines = (tmp_path / "captions.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    names = sorted(path.name for path in (tmp_path / "new_photos").iterdir())
    assert [record["key"] for record in records] == names
    assert all(record["caption"] for record in records)
