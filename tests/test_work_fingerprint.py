"""The fingerprints in folders of earlier versions are those of this one."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from latentkv.fingerprint import file_states, fingerprint


def test_bytes_count_as_they_are_and_all_else_as_json_with_its_keys_in_order() -> None:
    assert fingerprint([]) == sha256(b"").hexdigest()
    assert (
        fingerprint([{"b": [1, None, 0.5], "a": "é"}]) == sha256(rb'{"a": "\u00e9", "b": [1, null, 0.5]}').hexdigest()
    )
    assert fingerprint(part for part in (b"one", {"a": True}, b"two")) == sha256(b'one{"a": true}two').hexdigest()


def test_a_file_is_known_by_its_name_its_size_and_when_it_changed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(5, 7))
    assert file_states([tmp_path / "a"]) == [("a", 3, 7)]
    assert fingerprint([file_states([tmp_path / "a"])]) == sha256(b'[["a", 3, 7]]').hexdigest()
