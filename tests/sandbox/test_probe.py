"""A machine that cannot give a score is told why, and no submission is blamed for it."""

from pathlib import Path

import pytest
from inside import ask, worker

from pgolf.errors import EnvironmentBroken, Refused
from pgolf.sandbox import box, bubblewrap, probe


@pytest.fixture
def bwrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in bubblewrap's place that cannot make a sandbox."""
    path = tmp_path / "bwrap"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo bubblewrap ${VERSION:-0.9.0}; exit; }\n'
        "echo bwrap: setting up uid map: Permission denied >&2; exit 1\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    bubblewrap.program.cache_clear()
    yield path
    bubblewrap.program.cache_clear()


def test_real_worker_is_tried() -> None:
    """The probe starts what scoring starts, once in a process."""
    found = probe.check_isolation()
    assert found.description.startswith("bubblewrap, ") and found.seconds > 0
    assert probe.check_isolation() is found


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, "apparmor_restrict_unprivileged_userns=0"),
        ({"kernel/unprivileged_userns_clone": "0"}, "unprivileged_userns_clone=1"),
        ({"user/max_user_namespaces": "0"}, "max_user_namespaces=10000"),
        ({"container": "docker"}, "--privileged"),
        ({}, "unshare -Ur true"),
    ],
)
def test_unusable_bubblewrap_gets_advice_by_cause(
    settings: dict[str, str], remedy: str, bwrap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not "install bubblewrap", which is there."""
    monkeypatch.setattr(bubblewrap, "kernel_setting", lambda name: settings.get(name, ""))
    monkeypatch.setattr(bubblewrap, "in_container", lambda: "container" in settings)
    with pytest.raises(EnvironmentBroken) as caught:
        worker("")
    assert "Permission denied" in str(caught.value) and remedy in str(caught.value)
    assert "install bubblewrap" not in str(caught.value)


def test_old_and_missing_bubblewrap(bwrap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one is named with its version; a missing one with how to get it."""
    monkeypatch.setattr(bubblewrap, "MINIMUM", (0, 10))
    with pytest.raises(EnvironmentBroken, match=r"bubblewrap 0\.9\.0 is too old"):
        worker("")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentBroken, match="apt install bubblewrap"):
        worker("")


def test_report_names_each_failing_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check that fails has a reason and a remedy; those that hold have no remedy."""

    def broken(*_: object, **__: object) -> None:
        raise EnvironmentBroken("it does not work; mend it")

    monkeypatch.setattr(probe, "check_isolation", broken)
    monkeypatch.setattr(probe.seccomp, "program", lambda *_: None)
    monkeypatch.setattr(probe.Cgroup, "create", lambda *_: probe.Cgroup())
    monkeypatch.setattr(probe.lock, "reaches_machine", lambda: False)
    checks = {check.name: check for check in probe.report()}
    assert {name for name, check in checks.items() if not check.holds} >= {
        "sandbox", "compiler", "seccomp", "memory limit", "machine",
    }  # fmt: skip
    for check in checks.values():
        assert check.reason and bool(check.remedy) != check.holds


def test_guest_that_cannot_import_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is found before any code of a submission runs."""
    monkeypatch.setitem(box.environment.ROLE_PACKAGES, "decode", ("numpy", "sentencepiece", "no_such_module"))
    monkeypatch.setattr(box, "find_spec", lambda _: True)
    monkeypatch.setattr(box.environment, "OPTIONAL", {"no-such-module"})
    box.environment.listing.cache_clear()
    with pytest.raises(EnvironmentBroken, match="No module named 'no_such_module'"):
        worker("")
    box.environment.listing.cache_clear()


@pytest.mark.parametrize("isolated", [True, False])
def test_death_after_the_start_is_the_submissions(isolated: bool) -> None:
    """From the first line of its own code on, how it ends is its own affair."""
    with worker("import os; os._exit(9)", isolated=isolated) as sandbox, pytest.raises(Refused, match="exit status 9"):
        ask(sandbox)
