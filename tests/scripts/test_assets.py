"""The scripts that make the committed assets: what they replace, and that the committed READMEs are theirs."""

from __future__ import annotations

import sys

import make_digits_classifier
import make_digits_vae
import pytest
from replacing import refuse_others

from sit.latents.vae import DIGITS_VAE
from sit.metrics.digits import WEIGHTS
from sit.utils.errors import UserError

ASSETS = {
    "classifier": (WEIGHTS.parent, make_digits_classifier.TITLE, ("README.md", WEIGHTS.name)),
    "vae": (DIGITS_VAE, make_digits_vae.TITLE, make_digits_vae.FILES),
}


@pytest.mark.parametrize("kind", ASSETS)
def test_what_may_be_replaced(kind, tmp_path):
    committed, title, files = ASSETS[kind]
    refuse_others(committed, title, files)
    refuse_others(tmp_path / "new", title, files)
    refuse_others(tmp_path, title, files)
    for name in files:
        (tmp_path / name).write_text("# Another VAE\n")
    with pytest.raises(UserError, match="something else"):
        refuse_others(tmp_path, title, files)
    (tmp_path / "README.md").write_text(f"{title}\n")
    refuse_others(tmp_path, title, files)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something else"):
        refuse_others(tmp_path, title, files)
    with pytest.raises(UserError, match="something else"):
        refuse_others(tmp_path / "thesis.tex", title, files)


def test_a_folder_of_something_else_stays_as_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=f"`output_dir={tmp_path}`"):
        make_digits_classifier.main(make_digits_classifier.Config(tmp_path, steps=1))
    monkeypatch.setattr(sys, "argv", ["make_digits_vae", "--steps", "1", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_digits_vae.main()
    assert capsys.readouterr().err.startswith(f"error: --output-dir {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_asset_made_before_is_replaced(tmp_path):
    config = make_digits_classifier.Config(tmp_path / "classifier", steps=2)
    make_digits_classifier.main(config)
    before = (config.output_dir / WEIGHTS.name).read_bytes()
    config.seed = 1
    make_digits_classifier.main(config)
    assert (config.output_dir / WEIGHTS.name).read_bytes() != before
    assert sorted(path.name for path in config.output_dir.iterdir()) == ["README.md", WEIGHTS.name]
    assert list(tmp_path.iterdir()) == [config.output_dir]


def test_the_committed_vaes_readme_is_what_its_script_writes():
    lines = (DIGITS_VAE / "README.md").read_text().splitlines()
    assert [line for line in make_digits_vae.README.splitlines() if "{" not in line and line not in lines] == []
    assert {line.count("|") for line in lines if line.startswith("|")} == {4}
