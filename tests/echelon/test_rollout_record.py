from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import make_group

from databus.groups import Group
from databus.history import problem_key
from echelon.rollout_record import RolloutWriter, read_rollouts


def write(file: Path, groups: list[Group], first: int = 0) -> None:
    writer = RolloutWriter(file, num_prompts=3)
    for cursor, group in enumerate(groups, start=first):
        writer.record(cursor, f"g{cursor}", group)
    writer.close()


groups = st.lists(
    st.builds(
        make_group,
        st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
        st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)
anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@anywhere
@given(groups)
def test_what_is_written_is_read(tmp_path: Path, groups: list[Group]) -> None:
    file = tmp_path / "rollouts.bin"
    file.unlink(missing_ok=True)
    write(file, groups)
    records = list(read_rollouts(file))
    assert [(record.cursor, record.epoch) for record in records] == [(n, n // 3) for n in range(len(groups))]
    for record, group in zip(records, groups, strict=True):
        assert record.prompt().tolist() == group.prompt_ids.tolist()
        assert record.problem == problem_key(group.prompt_ids.tolist())
        completions = record.completions()
        assert [len(tokens) for tokens in completions] == group.lengths.tolist()
        assert np.concatenate(completions).tolist() == group.token_ids.tolist()
        assert record.newest_version() == group.version_values.max(initial=0)


@anywhere
@given(groups, st.data())
def test_a_torn_tail_is_passed_over_and_cut_off(tmp_path: Path, groups: list[Group], data: st.DataObject) -> None:
    """Wherever the broker was killed: whole records are there, and what it writes later is, too."""
    file = tmp_path / "rollouts.bin"
    file.unlink(missing_ok=True)
    write(file, groups[:-1])
    whole = file.stat().st_size
    write(file, groups[-1:], first=len(groups) - 1)
    torn = data.draw(st.integers(whole, file.stat().st_size - 1))
    file.write_bytes(file.read_bytes()[:torn])
    assert [record.cursor for record in read_rollouts(file)] == list(range(len(groups) - 1))
    write(file, groups[-1:], first=99)
    assert [record.cursor for record in read_rollouts(file)] == [*range(len(groups) - 1), 99]


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollouts.bin is missing: only a run with draft.record=true keeps"):
        list(read_rollouts(tmp_path / "rollouts.bin"))
    file = tmp_path / "rollouts.bin"
    write(file, [make_group((1,), [[0, 0]])] * 2)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 12] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match="record 1 is damaged"):
        list(read_rollouts(file))
    file.write_bytes(b"no rollouts at all")
    assert list(read_rollouts(file)) == []
