"""Every estimator against its formula written out token by token, and what must hold for all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from statistics import mean, stdev, variance

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.algorithms import AdvantageBatch, AdvantageSettings, Segments, find_estimator
from iiverl_core.algorithms.advantages.whitening import whiten
from iiverl_core.registry import ESTIMATORS

COMPARING = [name for name, estimator in ESTIMATORS.items() if estimator.min_group_size > 1]
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
every_comparing_estimator = pytest.mark.parametrize("name", COMPARING)
quick = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Row:
    """A response: its group, the reward and the value of each token, and the score of the greedy response."""

    group: int
    rewards: list[float]
    values: list[float]
    baseline: float = 0.0

    @property
    def reward(self) -> float:
        return math.fsum(self.rewards)


def row(group: int, *rewards: float) -> Row:
    return Row(group, list(rewards), [0.25 * i for i in range(len(rewards))])


@st.composite
def rows(draw, min_size: int = 1) -> list[Row]:
    """Responses of 1 to 6 tokens in up to 4 groups; often with the same rewards, sometimes one on each token.

    Rewards are sixteenths, whose sums are exact: equal ones are equal however they are added up.
    """
    sixteenths = st.integers(-80, 80).map(lambda steps: steps / 16)
    number = st.one_of(st.sampled_from([0.0, 1.0]), sixteenths)

    def one() -> Row:
        tokens = draw(st.integers(1, 6))
        rewards = [0.0] * (tokens - 1) + [draw(number)]
        if draw(st.booleans()):
            rewards = draw(st.lists(number, min_size=tokens, max_size=tokens))
        values = draw(st.lists(st.floats(-5, 5), min_size=tokens, max_size=tokens))
        return Row(draw(st.integers(0, 3)), rewards, values, draw(number))

    return [one() for _ in range(draw(st.integers(min_size, 8)))]


options = st.builds(
    AdvantageSettings,
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([1.0, 0.8, 0.0]),
    norm_by_std=st.booleans(),
)


def batch(rows: list[Row], dtype: torch.dtype = torch.float64) -> AdvantageBatch:
    def flat(numbers: list[list[float]]) -> Tensor:
        return torch.tensor([number for part in numbers for number in part], dtype=dtype)

    return AdvantageBatch(
        rewards_T=flat([row.rewards for row in rows]),
        segments=Segments.of([len(row.rewards) for row in rows]),
        group_B=torch.tensor([row.group for row in rows], dtype=torch.long),
        values_T=flat([row.values for row in rows]),
        baseline_B=torch.tensor([row.baseline for row in rows], dtype=dtype),
    )


def estimate(name: str, rows: list[Row], options: AdvantageSettings | None = None) -> list[list[float]]:
    """The advantages of each response's tokens."""
    made = batch(rows)
    advantages_T, _ = find_estimator(name)(made, options or AdvantageSettings())
    return [part.tolist() for part in made.segments.split(advantages_T)]


def assert_same(ours: list[list[float]], theirs: list[list[float]]) -> None:
    assert [len(part) for part in ours] == [len(part) for part in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-7, abs=1e-7)


# The formulas, written out. Each compares with nobody but the responses that are there, so these also say what becomes
# of a group that has lost a member.


def others(rows: list[Row], i: int) -> list[Row]:
    return [row for j, row in enumerate(rows) if j != i and row.group == rows[i].group]


def members(rows: list[Row], i: int) -> list[Row]:
    return [*others(rows, i), rows[i]]


def over_std(advantage: float, group: list[Row], options: AdvantageSettings) -> float:
    return advantage / (stdev(row.reward for row in group) + 1e-6) if options.norm_by_std else advantage


def plain_grpo(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    group = members(rows, i)
    return over_std(rows[i].reward - mean(row.reward for row in group), group, options)


def plain_grpo_passk(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    rest = max(row.reward for row in others(rows, i))
    return over_std(max(rows[i].reward - rest, 0.0), members(rows, i), options)


def plain_rloo(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    return rows[i].reward - mean(row.reward for row in others(rows, i))


def plain_opo(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    return rows[i].reward - mean(row.reward for row in members(rows, i) for _ in row.rewards)


def plain_gpg(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    compared = [members(rows, j) for j in range(len(rows)) if others(rows, j)]
    informative = [group for group in compared if len({row.reward for row in group}) > 1]
    difference = rows[i].reward - mean(row.reward for row in members(rows, i))
    return difference * len(compared) / max(len(informative), 1)


def plain_difference(rows: list[Row], i: int, options: AdvantageSettings) -> float:
    return rows[i].reward - mean(row.reward for row in members(rows, i))


def plain_gae(row: Row, options: AdvantageSettings) -> list[float]:
    advantages, later, next_value = [], 0.0, 0.0
    for reward, value in reversed(list(zip(row.rewards, row.values, strict=True))):
        later = reward + options.gamma * next_value - value + options.gamma * options.lam * later
        advantages.append(later)
        next_value = value
    return advantages[::-1]


def plain_returns(row: Row, gamma: float) -> list[float]:
    return [
        math.fsum(gamma**k * reward for k, reward in enumerate(row.rewards[t:]))
        for t in range(len(row.rewards))
    ]


def plain_whiten(parts: list[list[float]]) -> list[list[float]]:
    numbers = [number for part in parts for number in part]
    if len(numbers) < 2:
        return [[0.0] for _ in numbers]
    middle, spread = mean(numbers), math.sqrt(variance(numbers) + 1e-8)
    return [[(number - middle) / spread for number in part] for part in parts]


OUTCOME: dict[str, Callable[[list[Row], int, AdvantageSettings], float]] = {
    "grpo": plain_grpo,
    "grpo_passk": plain_grpo_passk,
    "rloo": plain_rloo,
    "opo": plain_opo,
    "gpg": plain_gpg,
    "reinforce_plus_plus_baseline": plain_difference,
}


def plain(name: str, rows: list[Row], options: AdvantageSettings) -> list[list[float]]:
    if name == "gae":
        return plain_whiten([plain_gae(row, options) for row in rows])
    if name == "reinforce_plus_plus":
        return plain_whiten([plain_returns(row, options.gamma) for row in rows])
    if name == "remax":
        return [[g - row.baseline for g in plain_returns(row, 1.0)] for row in rows]
    by_response = {i: OUTCOME[name](rows, i, options) for i in range(len(rows)) if others(rows, i)}
    parts = {i: [advantage] * len(rows[i].rewards) for i, advantage in by_response.items()}
    if name == "reinforce_plus_plus_baseline":
        parts = dict(zip(parts, plain_whiten(list(parts.values())), strict=True))
    return [parts.get(i, [0.0] * len(row.rewards)) for i, row in enumerate(rows)]


@every_estimator
@quick
@given(rows=rows(), options=options)
@example(
    rows=[row(0, 1.0), row(0, 0.0, 0.0), row(1, 0.0, 1.0), row(1, 0.5), row(1, 0.0)],
    options=AdvantageSettings(),
)
@example(
    rows=[row(0, 0.0, 3.0), row(1, 1.0), row(1, 0.0, 2.0)], options=AdvantageSettings()
)  # group 0 lost its others
@example(rows=[row(0, 7.0)], options=AdvantageSettings())
def test_advantages_follow_the_formula(name: str, rows: list[Row], options: AdvantageSettings) -> None:
    assert_same(estimate(name, rows, options), plain(name, rows, options))


@every_estimator
def test_a_step_of_many_groups_follows_the_formula(name: str) -> None:
    random = Random(0)
    rows = [
        Row(
            group=random.randrange(40),
            rewards=[0.0] * random.randrange(5) + [random.randrange(3) / 2],
            values=[],
            baseline=random.randrange(2),
        )
        for _ in range(300)
    ]
    rows = [replace(row, values=[random.random() for _ in row.rewards]) for row in rows]
    options = AdvantageSettings(gamma=0.9, lam=0.8)
    assert_same(estimate(name, rows, options), plain(name, rows, options))


@quick
@given(rows=rows(), options=options)
def test_returns_are_what_a_critic_learns(rows: list[Row], options: AdvantageSettings) -> None:
    made = batch(rows)
    _, returns_T = find_estimator("gae")(made, options)
    expected = [[a + v for a, v in zip(plain_gae(row, options), row.values, strict=True)] for row in rows]
    assert_same([part.tolist() for part in made.segments.split(returns_T)], expected)
    if options.lam == 1:
        assert_same(expected, [plain_returns(row, options.gamma) for row in rows])


@every_estimator
@quick
@given(rows=rows(), options=options, random=st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_nothing(name: str, rows: list[Row], options, random) -> None:
    order = random.sample(range(len(rows)), len(rows))
    result = estimate(name, rows, options)
    assert_same(estimate(name, [rows[i] for i in order], options), [result[i] for i in order])


@every_estimator
@quick
@given(rows=rows(), options=options, names=st.permutations([0, 1, 2, 7]))
def test_the_names_of_groups_change_nothing(name: str, rows: list[Row], options, names: list[int]) -> None:
    renamed = [replace(row, group=names[row.group]) for row in rows]
    assert_same(estimate(name, renamed, options), estimate(name, rows, options))


@every_estimator
@quick
@given(rows=rows(), options=options)
def test_who_compares_says_so(name: str, rows: list[Row], options: AdvantageSettings) -> None:
    """Whoever takes groups of one does not look at groups, and whoever does not gives them 0 and leaves them out."""
    if find_estimator(name).min_group_size == 1:
        together = [replace(row, group=0) for row in rows]
        assert_same(estimate(name, together, options), estimate(name, rows, options))
        return
    result = estimate(name, rows, options)
    kept = [i for i in range(len(rows)) if others(rows, i)]
    for i in set(range(len(rows))) - set(kept):
        assert result[i] == [0.0] * len(rows[i].rewards)
    assert_same(estimate(name, [rows[i] for i in kept], options), [result[i] for i in kept])


@every_comparing_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@quick
@given(
    level=st.one_of(st.just(1000.1), st.floats(-1e4, 1e4)),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7),
)
def test_a_group_without_variance_has_no_advantage(
    name: str, dtype: torch.dtype, level: float, lengths: list[int]
) -> None:
    """Exactly, in any precision: what remains of rounding would be blown up by a standard deviation of nearly 0."""
    equal = [row(0, *[0.0] * (length - 1), level) for length in lengths]
    advantages_T, _ = find_estimator(name)(batch(equal, dtype), AdvantageSettings())
    assert advantages_T.eq(0).all()


@pytest.mark.parametrize("name", [name for name in COMPARING if name != "reinforce_plus_plus_baseline"])
def test_a_group_without_variance_has_none_beside_others_that_vary(name: str) -> None:
    result = estimate(name, [row(0, 0.3), row(0, 0.0, 0.3), row(1, 0.0), row(1, 1.0), row(1, 0.0, 0.0)])
    assert result[:2] == [[0.0], [0.0, 0.0]]
    assert result[3][0] > 0


def test_whitening_after_a_baseline_moves_a_group_without_variance() -> None:
    shifted = estimate(
        "reinforce_plus_plus_baseline", [row(0, 0.3), row(0, 0.3), row(1, 0.0), row(1, 0.0, 1.0)]
    )
    assert shifted[0][0] == shifted[1][0] < 0  # the better response is the longer one, so the mean is above 0
    level = estimate("reinforce_plus_plus_baseline", [row(0, 0.3), row(0, 0.3), row(1, 0.0), row(1, 1.0)])
    assert level[0] == pytest.approx([0.0])


@pytest.mark.parametrize("name", [name for name, each in ESTIMATORS.items() if each.per_group])
@quick
@given(rows=rows(), options=options)
def test_a_group_alone_has_the_same_advantages(name: str, rows: list[Row], options) -> None:
    """To the last bit, so that a mini-batch can be trained before the step's other groups are there."""
    whole = estimate(name, rows, options)
    for group in {row.group for row in rows}:
        own = [i for i, row in enumerate(rows) if row.group == group]
        assert estimate(name, [rows[i] for i in own], options) == [whole[i] for i in own]


@every_comparing_estimator
@quick
@given(rows=rows(), options=options, constant=st.integers(-3, 3))
@example(rows=[row(0, 1.0), row(0, 0.0), row(1, 0.0), row(1, 0.0)], options=AdvantageSettings(), constant=1)
def test_a_constant_in_all_rewards_changes_nothing(
    name: str, rows: list[Row], options, constant: int
) -> None:
    raised = [replace(row, rewards=[*row.rewards[:-1], row.rewards[-1] + constant]) for row in rows]
    assert_same(estimate(name, raised, options), estimate(name, rows, options))


@every_comparing_estimator
def test_where_in_a_response_a_reward_stands_does_not_matter(name: str) -> None:
    early = [row(0, 1.0, 0.5, 0.0), row(0, 0.0, 0.25), row(1, 1.0), row(1, 0.0, 0.0)]
    late = [row(0, 0.0, 0.0, 1.5), row(0, 0.25, 0.0), row(1, 1.0), row(1, 0.0, 0.0)]
    assert_same(estimate(name, early), estimate(name, late))


@pytest.mark.parametrize("name", ["gae", "reinforce_plus_plus", "remax"])
def test_a_token_is_not_credited_with_earlier_rewards(name: str) -> None:
    made = batch([row(0, 1.0, -0.5, 2.0), row(0, 4.0)])
    _, returns_T = find_estimator(name)(made, AdvantageSettings())
    assert returns_T.tolist() == pytest.approx([2.5, 1.5, 2.0, 4.0])


def test_rewards_are_discounted_where_there_is_a_discount() -> None:
    made, options = batch([row(0, 0.0, 0.0, 1.0)]), AdvantageSettings(gamma=0.5)
    assert find_estimator("reinforce_plus_plus")(made, options)[1].tolist() == [0.25, 0.5, 1.0]
    assert find_estimator("gae")(made, options)[1].tolist() == [0.25, 0.5, 1.0]
    assert find_estimator("remax")(made, options)[1].tolist() == [1.0, 1.0, 1.0]


def test_prompts_that_teach_nothing_do_not_dilute_gpg() -> None:
    mixed = [row(0, 1.0), row(0, 0.0)]
    solved = [row(1, 1.0), row(1, 1.0)]
    assert estimate("gpg", mixed) == [[0.5], [-0.5]]
    assert estimate("gpg", mixed + solved) == [[1.0], [-1.0], [0.0], [0.0]]


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@quick
@given(rows=rows(), options=options, scale=st.sampled_from([0.0, 1e-20, 1e-4, 1.0, 1e6]))
def test_finite_rewards_give_finite_advantages(name: str, dtype, rows: list[Row], options, scale) -> None:
    scaled = [
        Row(
            row.group, [scale * r for r in row.rewards], [scale * v for v in row.values], scale * row.baseline
        )
        for row in rows
    ]
    made = batch(scaled, dtype)
    for result_T in find_estimator(name)(made, options):
        assert result_T.dtype == dtype
        assert result_T.shape == made.rewards_T.shape
        assert result_T.isfinite().all()


@every_estimator
@quick
@given(rows=rows(), options=options, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_stands_under_the_padding_changes_nothing(name: str, rows: list[Row], options, garbage) -> None:
    width = max(len(row.rewards) for row in rows)
    mask_BL = torch.arange(width) < torch.tensor([len(row.rewards) for row in rows])[:, None]

    def unpadded(numbers: list[list[float]]) -> Tensor:
        padded = [part + [garbage] * (width - len(part)) for part in numbers]
        return torch.tensor(padded, dtype=torch.float64)[mask_BL]

    clean = batch(rows)
    made = replace(
        clean,
        rewards_T=unpadded([row.rewards for row in rows]),
        values_T=unpadded([row.values for row in rows]),
        segments=Segments(mask_BL.sum(1)),
    )
    for ours_T, clean_T in zip(
        find_estimator(name)(made, options), find_estimator(name)(clean, options), strict=True
    ):
        assert torch.equal(ours_T, clean_T)


@every_estimator
def test_no_responses_give_no_advantages(name: str) -> None:
    for result_T in find_estimator(name)(batch([]), AdvantageSettings()):
        assert result_T.shape == (0,)


@every_estimator
def test_inputs_are_left_as_they_are(name: str) -> None:
    given = [row(0, 1.0, 2.0), row(0, 0.0), row(1, 1.0, 0.0, 3.0)]
    made, untouched = batch(given), batch(given)
    find_estimator(name)(made, AdvantageSettings(gamma=0.9, lam=0.9))
    for field in ("rewards_T", "values_T", "baseline_B", "group_B"):
        assert torch.equal(getattr(made, field), getattr(untouched, field))


@every_estimator
def test_only_gae_needs_a_critic_and_only_who_says_so_a_greedy_response(name: str) -> None:
    bare = replace(batch([row(0, 1.0), row(0, 0.0)]), values_T=None, baseline_B=None)
    if name == "gae":
        with pytest.raises(ValueError, match="the gae estimator needs a critic's values"):
            find_estimator(name)(bare, AdvantageSettings())
    elif find_estimator(name).greedy_baseline:
        with pytest.raises(ValueError, match=f"the {name} estimator needs the score of a greedy response"):
            find_estimator(name)(bare, AdvantageSettings())
    else:
        assert find_estimator(name)(bare, AdvantageSettings())[0].isfinite().all()


@quick
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_whitened_tokens_have_mean_0_and_variance_1(numbers: list[float]) -> None:
    whitened_T = whiten(torch.tensor(numbers, dtype=torch.float64))
    assert whitened_T.mean().abs() < 1e-9
    spread = variance(numbers)
    assert whitened_T.var().item() == pytest.approx(spread / (spread + 1e-8), abs=1e-9)


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_equal_tokens_are_whitened_to_nothing(tokens: int) -> None:
    assert whiten(torch.full((tokens,), 1000.1)).tolist() == [0.0] * tokens


@pytest.mark.parametrize("factor", [1.0, 0.97, 0.0])
def test_a_discounted_sum_stays_in_its_sequence(factor: float) -> None:
    lengths = [1, 700, 2, 3, 64, 65]
    segments = Segments.of(lengths)
    x_T = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sum_T, part_T in zip(
        segments.split(segments.discounted_sum(x_T, factor)), segments.split(x_T), strict=True
    ):
        later, expected = 0.0, []
        for number in reversed(part_T.tolist()):
            later = number + factor * later
            expected.append(later)
        assert sum_T.tolist() == pytest.approx(expected[::-1], rel=1e-12, abs=1e-12)
    x_T[1:701] = math.nan
    assert segments.discounted_sum(x_T, factor).isnan().sum() == 700
