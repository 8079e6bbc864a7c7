"""SPICE: F1 over what captions say of objects, attributes and relations, by the reference program.

Anderson et al., ECCV 2016. Its parser, Stanford CoreNLP 3.6.0 with its models, is in no package:
`CAPJAX_CORENLP` names the directory that holds its jars.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capjax.evaluation import java

VARIABLE = "CAPJAX_CORENLP"


def why_missing() -> str:
    """Why SPICE cannot run here; "" where it can."""
    if reason := java.why_missing():
        return reason
    place = os.environ.get(VARIABLE)
    if not place or not list(Path(place).glob("stanford-corenlp-*-models.jar")):
        return f"needs Stanford CoreNLP 3.6.0: set {VARIABLE} to the directory of its jars"
    return ""


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """float64 [N], in [0, 1]; NaN where neither caption nor references say anything it parses.

    Raises `RuntimeError` where the program fails. It takes some seconds to start, and a tenth of a
    second for a caption.
    """
    place = java.require() / "spice"
    jars = [place / "spice-1.0.jar", place / "lib" / "*", Path(os.environ[VARIABLE]) / "*"]
    captions = [
        {"image_id": index, "test": candidate, "refs": list(refs)}
        for index, (candidate, refs) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="capjax-spice-") as scratch:
        asked, answered = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        asked.write_text(json.dumps(captions))
        command = ["java", "-Xmx8G", "-cp", os.pathsep.join(map(str, jars))]
        ran = subprocess.run(
            [*command, "edu.anu.spice.SpiceScorer", asked, "-out", answered, "-silent"],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        if ran.returncode or not answered.exists():
            raise RuntimeError(f"SPICE stopped: {ran.stderr.strip()[-300:]}")
        found = json.loads(answered.read_text())
    scores = {item["image_id"]: item["scores"]["All"]["f"] for item in found}
    return np.array([float(scores[index]) for index in range(len(captions))])
