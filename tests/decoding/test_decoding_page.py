"""docs/decoding.md is what is run, from top to bottom."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"


@pytest.mark.slow
def test_every_line_of_the_page_runs(run_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_directory, target_is_directory=True)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 9
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["captions"]) == 3 and names["scores"].shape == (4,)
    assert "0 " in capsys.readouterr().out
