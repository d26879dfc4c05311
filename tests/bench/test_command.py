# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma bench`: wrong input."""

import pytest

from trl_cuma.cli import main


def test_wrong_input_is_one_line(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_numbers_of_processes_are_checked(tmp_path, capsys, option):
    assert main(["bench", str(tmp_path / "none.yaml"), option, "0"]) == 2
    assert f"`{option}` must be at least 1, got 0" in capsys.readouterr().err
