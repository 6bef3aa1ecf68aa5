"""Each attack on training of tests/attacks ends as its attack.toml says, and gains without its defence.

PGOLF_TEST_ALL=1 takes all variants and the slow ones, -rP prints how they end.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from attack_tools.attack import ALL, FOLDER, sampled
from attack_tools.training import DEFENCES, TrainingAttack, Trainings, discover, surroundings, variants

from pgolf import rules

pytestmark = pytest.mark.xdist_group("attacks")  # which leave marks where others look for them

ATTACKS = discover()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """Runs of the attacks."""
    with surroundings(tmp_path_factory.mktemp("training")) as found:
        yield found


@pytest.mark.parametrize(("name", "variant"), variants(ATTACKS, ALL))
def test_attack_ends_as_it_says(name: str, variant: str, runs: Trainings) -> None:
    """Refused in a sentence that says why, or with an artifact that holds nothing of what it looked for."""
    runs.check_ending(ATTACKS[name], variant)


@pytest.mark.parametrize(("name", "variant"), variants({name: ATTACKS[name] for name in sampled(ATTACKS)}, ALL))
def test_attack_gains_without_the_defence(name: str, variant: str, runs: Trainings) -> None:
    """The attack is real: where the defence is taken away it gets what it is after."""
    runs.check_counterfactual(ATTACKS[name], variant)


def test_every_folder_is_run() -> None:
    """There are at least as many as the known ways to cheat, and each test that they name exists."""
    assert len(ATTACKS) >= 12
    for name, attack in ATTACKS.items():
        assert (attack.folder / "train.py").is_file(), name
        assert not attack.test or callable(globals().get(attack.test)), name


@pytest.mark.parametrize(
    "wrong",
    [{"ending": "wins"}, {"without": "luck"}, {"no_counterfactual": "both"}, {"gain_bits": 0}, {"ending": "refused"}],
)
def test_contradictory_description_is_an_error(wrong: dict[str, Any]) -> None:
    """So that no attack is left out by a slip."""
    sound: dict[str, Any] = {"side": "training", "exploits": "A hole.", "ending": "no gain"}
    sound |= {"without": "sandbox", "gain_bits": 1}
    TrainingAttack(FOLDER / "x", **sound)
    with pytest.raises(ValueError, match=r"x/attack\.toml: "):
        TrainingAttack(FOLDER / "x", **sound | wrong)


def test_readme_lists_the_defences() -> None:
    """A newcomer finds each name that `without` may have."""
    listed = (FOLDER / "README.md").read_text().partition("## Training")[2]
    assert all(f"| `{name}` |" in listed for name in DEFENCES)


def test_equal_artifacts_count_once(runs: Trainings) -> None:
    """Two seeds that give the same bytes are one run."""
    found = runs.end(ATTACKS["train_ignores_seed"], "")
    assert found.earlier == (found.artifact,) and found.artifact
    verdict = pytest.importorskip("pgolf.contest.verdict")
    digests = [(hashlib.sha256(each).hexdigest(),) for each in (*found.earlier, found.artifact)]
    assert verdict.distinct(digests) == [0]


@pytest.mark.parametrize("name", ["train_weights_in_source", "train_text_in_source"])
def test_source_is_bounded_and_pointed_out(name: str) -> None:
    """The limit on source bounds what it carries; each file that is as dense as noise is shown to a person."""
    sources = ATTACKS[name].sources
    assert sum(map(len, sources.values())) < rules.SOURCE_BYTES
    plausible = pytest.importorskip("pgolf.contest.plausible")
    pointed_out = {line.partition(":")[0] for line in plausible.sources(sources)}
    dense = {"train_weights_in_source": {"as_base64.py", "as_array.h"}, "train_text_in_source": {"packed.py"}}
    assert dense[name] <= pointed_out <= set(sources) - {"train.py", "harness.py", "channels.py"}
