"""Whatever happens to a checkpoint's files is recognised and named, and the checkpoint before is used."""

import random
import re
import shutil
from pathlib import Path

import pytest

from iiverl_core.checkpoints import MANIFEST, POINTER, latest, verify, write
from iiverl_core.errors import CheckpointError

FILES = {
    "actor/__0_0.distcp": 4000,
    "actor/__1_0.distcp": 4000,
    "critic/__0_0.distcp": 900,
    "train_state.json": 300,
    "config.json": 1200,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    root, draw = tmp_path_factory.mktemp("run"), random.Random(0)
    for step in (10, 20):
        with write(root, step, metrics={"score": 0.5}) as folder:
            for name, size in FILES.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(draw.randbytes(size))
    return root


def truncate(folder: Path, name: str, draw: random.Random) -> set[str]:
    with (folder / name).open("rb+") as file:
        file.truncate(draw.randrange((folder / name).stat().st_size))
    return {name}


def flip(folder: Path, name: str, draw: random.Random) -> set[str]:
    content = bytearray((folder / name).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    return {name}


def delete(folder: Path, name: str, draw: random.Random) -> set[str]:
    (folder / name).unlink()
    return {name}


def lengthen(folder: Path, name: str, draw: random.Random) -> set[str]:
    with (folder / name).open("ab") as file:
        file.write(draw.randbytes(1 + draw.randrange(50)))
    return {name}


def swap(folder: Path, name: str, draw: random.Random) -> set[str]:
    other = draw.choice([each for each in (*FILES, MANIFEST) if each != name])
    (folder / name).rename(folder / "aside")
    (folder / other).rename(folder / name)
    (folder / "aside").rename(folder / other)
    return {name, other}


def point_elsewhere(folder: Path, name: str, draw: random.Random) -> set[str]:
    pointer = folder.parent / POINTER
    match draw.randrange(3):
        case 0:
            pointer.unlink()
        case 1:
            pointer.write_text(draw.choice(["10", "30", "999999999999"]))
        case _:
            pointer.write_bytes(draw.choice([b"", b"\xff\xfe\x00", b"twenty", b"2" * 5000]))
    return {POINTER}


WAYS = (truncate, flip, delete, lengthen, swap, point_elsewhere)


@pytest.mark.parametrize("part", range(5))
def test_a_corruption_is_recognised_and_named_and_the_checkpoint_before_is_used(
    saved: Path, tmp_path: Path, part: int
) -> None:
    for seed in range(30 * part, 30 * (part + 1)):
        draw = random.Random(seed)
        root = tmp_path / str(seed)
        shutil.copytree(saved, root)
        folder = root / "global_step_20"
        ways = draw.sample(WAYS, 1 + seed % 2)
        names = draw.sample([*FILES, MANIFEST], len(ways))
        damaged: set[str] = set()
        for way, name in zip(ways, names, strict=True):
            if (folder / name).exists():
                damaged |= way(folder, name, draw)

        found = latest(root)
        assert found.checkpoint is not None
        if damaged <= {POINTER}:
            assert found.checkpoint.step == 20
            assert found.passed_over == ()
        else:
            assert found.checkpoint.step == 10, (seed, ways, names)
            ((where, reason),) = found.passed_over
            assert where == folder
            unnamed = damaged - {POINTER} - set(re.findall(r"[\w./]+", reason))
            assert not unnamed or MANIFEST in damaged & {reason.partition(": ")[2].split()[0]}, (seed, reason)
        pointer = root / POINTER
        is_right = pointer.exists() and pointer.read_bytes() == str(found.checkpoint.step).encode()
        assert (found.pointer_problem is None) == is_right
        if found.pointer_problem:
            assert POINTER in found.pointer_problem
        shutil.rmtree(root)


def test_names_and_sizes_alone_are_checked_without_hashes(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "global_step_20", tmp_path / "global_step_20"))
    flip(folder, "config.json", random.Random(1))
    verify(folder, hashes=False)
    with pytest.raises(CheckpointError, match=r"config\.json has changed"):
        verify(folder)
    truncate(folder, "actor/__0_0.distcp", random.Random(1))
    delete(folder, "train_state.json", random.Random(1))
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp has \d+ bytes instead of 4000.*; train_state\.json is missing"
    ):
        verify(folder, hashes=False)


def test_a_manifest_with_a_field_that_nothing_here_writes_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "global_step_20", tmp_path / "global_step_20"))
    path = folder / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"serial"', '"colour": 1,\n "serial"'))
    with pytest.raises(CheckpointError, match=r"manifest\.json has unknown fields: colour"):
        verify(folder)
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="later version of iiverl"):
        verify(folder)


def test_a_folder_under_another_step_s_name_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "global_step_20", tmp_path / "global_step_30")
    with pytest.raises(CheckpointError, match=r"is that of step 20; was the folder renamed"):
        verify(tmp_path / "global_step_30")
    shutil.copytree(saved / "global_step_20", tmp_path / "mine")
    assert verify(tmp_path / "mine").step == 20


def test_further_files_in_a_checkpoint_are_left_alone(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "global_step_20", tmp_path / "global_step_20"))
    (folder / "notes.txt").write_text("the good one")
    assert verify(folder).step == 20
