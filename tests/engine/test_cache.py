"""Where the user's cache is, for users with a home and without."""

import os
import tempfile
from pathlib import Path

import pytest

from pagellm.engine import ConfigError
from pagellm.engine import cache as cache_module
from pagellm.engine.cache import cache_dir


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PAGELLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache_module._temporary_dir.cache_clear()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user of a container that has no entry among its users."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def test_the_places_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/pagellm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    assert cache_dir() == Path("/home/me/.cache/pagellm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/pagellm")
    monkeypatch.setenv("PAGELLM_CACHE", "~/mine")
    assert cache_dir() == Path("/home/me/mine")
    monkeypatch.setenv("PAGELLM_CACHE", "mine")
    assert cache_dir() == Path.cwd() / "mine"


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_cache_is_a_private_directory_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tmp_path / f"pagellm-{os.getuid()}"
    assert cache_dir() == cache_dir() == expected
    assert expected.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (
        f"pagellm: the user has no home: the cache is {expected} (PAGELLM_CACHE names another)\n"
    )


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("found", ["a file", "a link", "open to all", "another's", "no place"])
def test_a_temporary_directory_that_is_not_the_users_alone_is_refused(
    tmp_path: Path, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"pagellm-{os.getuid()}"
    if found == "a file":
        path.write_text("")
    elif found == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif found == "open to all":
        path.mkdir()
        path.chmod(0o777)
    elif found == "another's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        path = tmp_path / "pagellm-12345"
        path.mkdir(mode=0o700)
        if path.stat().st_uid == 12345:
            pytest.skip("this user is that one")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="PAGELLM_CACHE"):
        cache_dir()


@pytest.mark.usefixtures("homeless")
def test_a_home_that_is_not_known_cannot_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGELLM_CACHE", "~/mine")
    with pytest.raises(ConfigError, match="PAGELLM_CACHE: found '~/mine', whose home is not known"):
        cache_dir()
