"""The text that names a data set: an ``@`` in the name of what exists is no split and no side."""

from __future__ import annotations

import pytest

from sit.data.spec import split_at


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name@test", ("owner/name", "test")),
        ("data/train-*.parquet@validation", ("data/train-*.parquet", "validation")),
        ("owner/name@train[:10%]", ("owner/name", "train[:10%]")),
        ("us@er/a.parquet", ("us@er/a.parquet", "")),
        ("us@er/a.parquet@test", ("us@er/a.parquet", "test")),
        ("us@er/none.parquet", ("us@er/none.parquet", "")),
        ("us@er/none-*.parquet@train[:2]", ("us@er/none-*.parquet", "train[:2]")),
        ("b@1.parquet", ("b@1.parquet", "")),
        ("b@1.parquet@test", ("b@1.parquet", "test")),
        ("b@*.parquet", ("b@*.parquet", "")),
        ("b@*.parquet@test", ("b@*.parquet", "test")),
        ("c@256", ("c@256", "")),
        ("c@256@512", ("c@256", "512")),
        ("c [1]@2", ("c [1]@2", "")),
        ("d@256", ("d", "256")),
    ],
)
def test_what_follows_the_last_at(tmp_path, monkeypatch, text, parts):
    monkeypatch.chdir(tmp_path)
    for name in ("us@er", "c@256", "c [1]@2", "d"):
        (tmp_path / name).mkdir()
    for name in ("us@er/a.parquet", "b@1.parquet"):
        (tmp_path / name).touch()
    assert split_at(text) == parts
