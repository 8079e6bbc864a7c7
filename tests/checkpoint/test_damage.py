"""Nothing damaged is restored: the one before it is used, and one line says what is wrong."""

import random
import re
import shutil
from pathlib import Path

import pytest
from etils import epath

from capjax.checkpoint import Checkpointer, files, load_params, verify
from capjax.checkpoint.arrays import read_arrays, stored_struct
from capjax.checkpoint.files import METADATA_FILE, Damage, read_metadata
from capjax.errors import UserError

LARGE = 2**9  # rows of 32 bytes: the files of the arrays are larger than `HASHED_BYTES` is here
HASHED_BYTES = 2**13


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, state_of, run_info) -> Path:
    """Good checkpoints of steps 10 and 20; the newer one has a file that only a digest guards."""
    directory = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch, Checkpointer(directory, run_info) as checkpointer:
        patch.setattr(files, "HASHED_BYTES", HASHED_BYTES)
        checkpointer.save(10, state_of(1, large=LARGE), {"examples_seen": 1})
        checkpointer.save(20, state_of(2, large=LARGE), {"examples_seen": 2})
        checkpointer.wait()
    return directory


@pytest.fixture
def directory(pristine, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


@pytest.fixture
def restored_step(open_checkpointer, state_of, abstract, bits_of):
    """`restored_step()`: the step that is restored, after a check that it is what was saved."""
    good = {10 * seed: bits_of(state_of(seed, large=LARGE)) for seed in (1, 2)}
    target = abstract(state_of(3, large=LARGE))
    ours = open_checkpointer()

    def restore() -> int:
        ours.reports.clear()
        step, state, extra = ours.restore_latest(target)
        assert bits_of(state) == good[step], f"step {step} came back as something else"
        assert extra == {"examples_seen": step // 10}
        return step

    restore.reports = ours.reports
    return restore


def data_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def flip_in_params(checkpoint: Path, state) -> None:
    """Flips a bit in the middle of params/large, which is stored as it is."""
    row = state.params["large"][LARGE // 2].tobytes()
    (path,) = [path for path in unhashed(checkpoint) if row in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(row)] ^= 1
    path.write_bytes(content)


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def unhashed(checkpoint: Path) -> list[Path]:
    """The files that only the arrays' digests guard."""
    return [p for p in data_files(checkpoint) if p.stat().st_size > HASHED_BYTES]


def test_200_flipped_bits(directory, restored_step):
    """Half in any file, metadata as often as data; half in the array data that no hash covers.

    There a flip in what no reader looks at (a spare bit of a frame) is no damage: what comes back
    is what was saved, bit for bit.
    """
    newest, aside = directory / "00000020", directory / "00000020.damaged"
    assert restored_step() == 20
    rng = random.Random(0)
    spoiled, arrays, harmless = set(), set(), 0
    for trial in range(200):
        path = rng.choice(data_files(newest) if trial % 2 else unhashed(newest))
        original = path.read_bytes()
        flip_a_bit(path, rng)
        step = restored_step()
        if step == 20 and path in unhashed(newest):
            path.write_bytes(original)
            harmless += 1
            continue
        assert step == 10
        (line,) = restored_step.reports
        assert re.match(r"the checkpoint of step 20 is damaged \(.+\); step 10 is used inst", line)
        arrays |= set(re.findall(r"array (\S+) is not what was saved", line))
        spoiled.add(path.name)
        if len(original) <= HASHED_BYTES:
            assert path.name in line
        aside.rename(newest)
        path.write_bytes(original)
    assert harmless <= 10
    assert arrays >= {"params/large", "opt_state/0/mu/large"}
    assert {"capjax.json", "tokenizer.model", "_METADATA", "manifest.ocdbt"} <= spoiled
    assert restored_step() == 20


@pytest.mark.parametrize("harm", ["halved", "emptied", "deleted", "one byte longer"])
def test_every_file_is_missed(harm, directory, restored_step):
    newest = directory / "00000020"
    spoiled = data_files(newest)
    assert {"capjax.json", "tokenizer.model", "_METADATA"} < {path.name for path in spoiled}
    for path in spoiled:
        original = path.read_bytes()
        if harm == "deleted":
            path.unlink()
        elif harm == "emptied":
            path.write_bytes(b"")
        elif harm == "halved":
            path.write_bytes(original[: len(original) // 2])
        else:
            path.write_bytes(original + b"\0")
        assert restored_step() == 10
        assert len(restored_step.reports) == 1
        assert str(path.relative_to(newest)) in restored_step.reports[0]
        (directory / "00000020.damaged").rename(newest)
        path.write_bytes(original)


def test_every_flip_of_the_metadata_is_seen(directory):
    newest = epath.Path(directory / "00000020")
    original = (newest / METADATA_FILE).read_bytes()
    read_metadata(newest)
    rng = random.Random(1)
    for place in rng.sample(range(8 * len(original)), 1000):
        content = bytearray(original)
        content[place // 8] ^= 1 << place % 8
        (newest / METADATA_FILE).write_bytes(content)
        with pytest.raises(Damage):
            read_metadata(newest)


def test_raw_storage_errors_become_one_clear_line(directory, state_of):
    """What Orbax says of broken files, were there no hashes before it."""
    state = state_of(1, large=LARGE)
    wanted = {"params/large": stored_struct(state.params["large"])}
    checkpoint = epath.Path(directory / "00000020")
    metadata = checkpoint / "state" / "_METADATA"
    original = metadata.read_text()
    for content in ("", "{]", original[:-5], original.replace("large", "small"), "{}"):
        metadata.write_text(content)
        with pytest.raises(Damage, match=r"^state/ (cannot be read: |lacks )[^\n]{5,200}$"):
            read_arrays(checkpoint, wanted)
    metadata.write_text(original)
    read_arrays(checkpoint, wanted)
    shutil.rmtree(checkpoint / "state")
    with pytest.raises(Damage, match=r"^state/ cannot be read: [^\n]{5,200}$"):
        read_arrays(checkpoint, wanted)


def test_the_step_of_a_damaged_one_can_be_saved_anew(
    directory, restored_step, open_checkpointer, state_of, bits_of, abstract
):
    for _ in range(2):
        (directory / "00000020" / "tokenizer.model").write_bytes(b"x")
        assert restored_step() == 10
        ours = open_checkpointer(directory)
        ours.save(20, state_of(2, large=LARGE), {"examples_seen": 2})
        ours.wait()
        assert restored_step() == 20
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["00000010", "00000020", "00000020.damaged", "00000020.damaged2"]


def test_all_damaged_is_an_error_and_touches_nothing(directory, restored_step):
    (directory / "00000010" / "tokenizer.model").unlink()
    (directory / "00000020" / METADATA_FILE).unlink()
    for _ in range(2):  # the same again: it must not start from nothing the second time
        with pytest.raises(UserError) as error:
            restored_step()
        assert "step 20: capjax.json is missing; step 10: tokenizer.model is miss" in str(
            error.value
        )
        assert sorted(path.name for path in directory.iterdir()) == ["00000010", "00000020"]


def test_load_params_uses_the_one_before(directory, capsys, state_of):
    assert load_params(directory).step == 20
    assert capsys.readouterr().err == ""
    flip_in_params(directory / "00000020", state_of(2, large=LARGE))
    assert load_params(directory).step == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("capjax: warning: the checkpoint of step 20 in")
    assert line.endswith("is not what was saved); step 10 is used instead")
    with pytest.raises(UserError, match=r"no good checkpoint .*step 20: array params/large is not"):
        load_params(directory / "00000020")
    assert sorted(path.name for path in directory.iterdir()) == ["00000010", "00000020"]


def test_verify_names_what_is_wrong(directory, state_of):
    place = epath.Path(directory)
    assert verify(place, 20) == []
    flip_in_params(directory / "00000020", state_of(2, large=LARGE))
    (directory / "00000020" / "tokenizer.model").write_bytes(b"x")
    assert verify(place, 20) == [
        "tokenizer.model has 1 bytes instead of 1024",
        "array params/large is not what was saved",
    ]
    shutil.rmtree(directory / "00000020" / "state")
    problems = verify(place, 20)
    assert any("state/_METADATA is missing" in problem for problem in problems)
    assert "cannot be read" in problems[-1]
    (directory / "00000020" / METADATA_FILE).write_text("{}")
    assert verify(place, 20) == ["capjax.json is not what was written"]
    assert verify(place, 10) == []
