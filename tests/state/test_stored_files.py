from hypothesis import given
from hypothesis import strategies as st

from latentkv.state.store.stored_files import StoredFile, StoredFiles, in_blocks

names = st.sampled_from("abcde")


def test_a_file_takes_whole_blocks():
    assert [in_blocks(size) for size in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]


@given(st.lists(st.tuples(names, st.integers(0, 30), st.integers(0, 9) | st.none()), max_size=60))
def test_totals_and_the_oldest_are_those_of_a_plain_dict(changes: list[tuple[str, int, int | None]]):
    files, plain = StoredFiles(), {}
    for name, used, size in changes:
        if size is None:
            files.remove(name)
            plain.pop(name, None)
        else:
            files.put(StoredFile(name, used, size))
            plain[name] = StoredFile(name, used, size)
        assert files.total_bytes == sum(file.size for file in plain.values())
        assert len(files) == len(plain)
        assert all((each in files) == (each in plain) and files.get(each) == plain.get(each) for each in "abcde")
        oldest = files.oldest()
        assert (oldest and oldest.used) == (min(file.used for file in plain.values()) if plain else None)
        assert oldest is None or plain[oldest.name] == oldest


def test_files_that_are_used_again_and_again_need_no_more_memory():
    files = StoredFiles()
    for used in range(50_000):
        files.put(StoredFile("abc"[used % 3], used, 1))
    assert len(files._by_use) < 5_000
    assert files.oldest() == StoredFile("abc"[49_997 % 3], 49_997, 1)
