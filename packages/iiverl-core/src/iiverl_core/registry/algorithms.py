"""The algorithms: advantage estimators, policy losses, aggregations and KL kinds.

Packages add theirs under the entry-point group `iiverl.algorithms`; the class of an info determines its kind.
"""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiverl_core.registry.registry import Info, Registry, load_code

GROUP = "iiverl.algorithms"
_USER_FUNCTIONS = "iiverl_core.algorithms.user_functions"


@dataclass(frozen=True, kw_only=True)
class AlgorithmInfo(Info):
    """An algorithm. `reads` names the settings that it reads; setting others is reported as having no effect."""

    reads: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The file of the code, found without importing it.

        Raises:
            ModuleNotFoundError: the module does not exist.
        """
        package, _, rest = self.code.partition(":")[0].partition(".")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no module {package}", name=package)
        origin = Path(spec.origin)
        path = origin.parent.joinpath(*rest.split(".")) if rest else origin.with_suffix("")
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    @property
    def documentation(self) -> str:
        """The docstring of its module, with formula, paper and edge cases, read without importing it."""
        return ast.get_docstring(ast.parse(self.file.read_text(encoding="utf-8"))) or ""


@dataclass(frozen=True, kw_only=True)
class EstimatorInfo(AlgorithmInfo):
    """An advantage estimator: `code` is a function of an `AdvantageBatch` and `AdvantageSettings`.

    Groups with fewer than `min_group_size` scored responses are dropped from the step. With `needs_critic`, a critic is
    trained and the batch has its values. With `greedy_baseline`, each prompt gets an additional response, decoded greedily,
    whose score is the baseline of the group. With `per_group`, the advantages of a group depend on no other one.
    """

    min_group_size: int = 1
    per_group: bool = False
    needs_critic: bool = False
    greedy_baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class PolicyLossInfo(AlgorithmInfo):
    """A policy loss: `code` is a function of a `PolicyBatch` and `PolicyLossSettings`.

    `select_tokens` is the code of the function that selects tokens of the whole mini-batch, if the loss needs one. If
    given, `loss_agg_mode` is part of the algorithm and replaces that of the configuration. `uses_ratio` is false if the
    loss does not depend on the old log-probs.
    """

    uses_ratio: bool = True
    select_tokens: str | None = None
    loss_agg_mode: str | None = None

    def load_select_tokens(self) -> Any:
        """Import the function that selects tokens; None if there is none."""
        return None if self.select_tokens is None else load_code(self.select_tokens, self.name)


@dataclass(frozen=True, kw_only=True)
class AggregationInfo(AlgorithmInfo):
    """An aggregation of token losses into the loss of a batch: `code` is a function of lengths and `max_tokens_norm`."""


@dataclass(frozen=True, kw_only=True)
class KLInfo(AlgorithmInfo):
    """An estimator of the KL divergence: `code` is a function of x_T, log π(token) - log π_ref(token)."""


UNBIASED = "+"
"""Suffix of the name of a KL kind: keep its value, but use the gradient of `k2`."""

_ADVANTAGES = "iiverl_core.algorithms.advantages"
_LOSSES = "iiverl_core.algorithms.policy_losses"

ESTIMATORS = Registry(
    "advantage estimator",
    GROUP,
    EstimatorInfo,
    (
        EstimatorInfo(
            name="gae",
            summary="GAE: the exponentially weighted average of n-step advantage estimates from a critic",
            code=f"{_ADVANTAGES}.gae:gae",
            reads=("gamma", "lam"),
            needs_critic=True,
        ),
        EstimatorInfo(
            name="grpo",
            summary="GRPO: a response is compared with the mean of the responses to the same prompt",
            code=f"{_ADVANTAGES}.grpo:grpo",
            reads=("norm_by_std",),
            min_group_size=2,
            per_group=True,
        ),
        EstimatorInfo(
            name="reinforce_plus_plus",
            summary="REINFORCE++: the discounted return of each token, whitened over the whole step instead of compared within a group",
            code=f"{_ADVANTAGES}.reinforce_plus_plus:reinforce_plus_plus",
            reads=("gamma",),
        ),
        EstimatorInfo(
            name="reinforce_plus_plus_baseline",
            summary="REINFORCE++-baseline: the difference from the group's mean, whitened over the whole step",
            code=f"{_ADVANTAGES}.reinforce_plus_plus_baseline:reinforce_plus_plus_baseline",
            min_group_size=2,
        ),
        EstimatorInfo(
            name="remax",
            summary="ReMax: a response is compared with the policy's greedy response to the same prompt",
            code=f"{_ADVANTAGES}.remax:remax",
            greedy_baseline=True,
        ),
        EstimatorInfo(
            name="rloo",
            summary="RLOO: a response is compared with the mean of the other responses to the same prompt",
            code=f"{_ADVANTAGES}.rloo:rloo",
            min_group_size=2,
            per_group=True,
        ),
        EstimatorInfo(
            name="opo",
            summary="OPO: a response is compared with the length-weighted mean of the responses to the same prompt",
            code=f"{_ADVANTAGES}.opo:opo",
            min_group_size=2,
            per_group=True,
        ),
        EstimatorInfo(
            name="gpg",
            summary="GPG: the difference from the group's mean, rescaled to make up for groups without a gradient",
            code=f"{_ADVANTAGES}.gpg:gpg",
            min_group_size=2,
        ),
        EstimatorInfo(
            name="grpo_passk",
            summary="Pass@k: only the best response to a prompt has an advantage, its margin over the second best",
            code=f"{_ADVANTAGES}.grpo_passk:grpo_passk",
            reads=("norm_by_std",),
            min_group_size=2,
            per_group=True,
        ),
    ),
    siblings=AlgorithmInfo,
)

POLICY_LOSSES = Registry(
    "policy loss",
    GROUP,
    PolicyLossInfo,
    (
        PolicyLossInfo(
            name="vanilla",
            summary="PPO's clipped loss, with dual clip and clip-higher",
            code=f"{_LOSSES}.vanilla:vanilla",
            reads=("clip_low", "clip_high", "clip_dual"),
        ),
        PolicyLossInfo(
            name="gspo",
            summary="GSPO: PPO's clipped loss with one ratio for a whole response",
            code=f"{_LOSSES}.gspo:gspo",
            reads=("clip_low", "clip_high"),
            loss_agg_mode="seq-mean-token-mean",
        ),
        PolicyLossInfo(
            name="cispo",
            summary="CISPO: REINFORCE weighted with a clipped ratio, so that no token loses its gradient",
            code=f"{_LOSSES}.cispo:cispo",
            reads=("clip_low", "clip_high"),
        ),
        PolicyLossInfo(
            name="sapo",
            summary="SAPO: a smooth gate on the ratio instead of PPO's clipping",
            code=f"{_LOSSES}.sapo:sapo",
            reads=("tau_pos", "tau_neg"),
            loss_agg_mode="seq-mean-token-mean",
        ),
        PolicyLossInfo(
            name="geo_mean",
            summary="GMPO: one ratio for a whole response, the geometric mean of its tokens' clipped ratios",
            code=f"{_LOSSES}.geo_mean:geo_mean",
            reads=("clip_low", "clip_high"),
            loss_agg_mode="seq-mean-token-mean",
        ),
        PolicyLossInfo(
            name="gpg",
            summary="GPG: the plain policy gradient, without a ratio and without clipping",
            code=f"{_LOSSES}.gpg:gpg",
            uses_ratio=False,
        ),
        PolicyLossInfo(
            name="clip_cov",
            summary="Clip-Cov: PPO's clipped loss without the gradient of a few of the tokens that lower the entropy most",
            code=f"{_LOSSES}.clip_cov:clip_cov",
            reads=("clip_low", "clip_high", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
            select_tokens=f"{_LOSSES}.clip_cov:select_at_random",
        ),
        PolicyLossInfo(
            name="kl_cov",
            summary="KL-Cov: the policy gradient with a KL penalty on the few tokens that lower the entropy most",
            code=f"{_LOSSES}.kl_cov:kl_cov",
            reads=("kl_cov_ratio", "ppo_kl_coef"),
            select_tokens=f"{_LOSSES}.kl_cov:select_largest",
        ),
        PolicyLossInfo(
            name="dppo_tv",
            summary="DPPO with the total variation: a trust region on the change of each token's probability",
            code=f"{_LOSSES}.dppo_tv:dppo_tv",
            reads=("clip_low", "clip_high", "clip_dual"),
        ),
        PolicyLossInfo(
            name="dppo_kl",
            summary="DPPO with the KL divergence: a trust region on the binary KL between old and new policy at each token",
            code=f"{_LOSSES}.dppo_kl:dppo_kl",
            reads=("clip_low", "clip_high", "clip_dual"),
        ),
    ),
    siblings=AlgorithmInfo,
)

_AGGREGATION = "iiverl_core.training.aggregation"

AGGREGATIONS = Registry(
    "aggregation",
    GROUP,
    AggregationInfo,
    (
        AggregationInfo(
            name="token-mean",
            summary="sum of all tokens / T (DAPO, arXiv:2503.14476, eq. 12)",
            code=f"{_AGGREGATION}:token_mean",
        ),
        AggregationInfo(
            name="token-sum",
            summary="sum of all tokens",
            code=f"{_AGGREGATION}:token_sum",
        ),
        AggregationInfo(
            name="seq-mean-token-sum",
            summary="mean over sequences of the sum over tokens",
            code=f"{_AGGREGATION}:seq_mean_token_sum",
        ),
        AggregationInfo(
            name="seq-mean-token-mean",
            summary="mean over sequences of the mean over tokens (GRPO, arXiv:2402.03300, eq. 3)",
            code=f"{_AGGREGATION}:seq_mean_token_mean",
        ),
        AggregationInfo(
            name="seq-mean-token-sum-norm",
            summary="sum of all tokens / (B · max_tokens_norm) (Dr. GRPO, arXiv:2503.20783)",
            code=f"{_AGGREGATION}:seq_mean_token_sum_norm",
            reads=("max_tokens_norm",),
        ),
    ),
    siblings=AlgorithmInfo,
)

_KL = "iiverl_core.algorithms.kl"

KL_KINDS = Registry(
    "KL kind",
    GROUP,
    KLInfo,
    (
        KLInfo(
            name="kl",
            aliases=("k1",),
            summary="x; unbiased, high variance, can be negative",
            code=f"{_KL}:k1",
        ),
        KLInfo(
            name="abs",
            summary="abs(x)",
            code=f"{_KL}:absolute",
        ),
        KLInfo(
            name="mse",
            aliases=("k2",),
            summary="x²/2; biased, low variance; its gradient is unbiased for the KL",
            code=f"{_KL}:k2",
        ),
        KLInfo(
            name="low_var_kl",
            aliases=("k3",),
            summary="exp(-x) - 1 + x; unbiased, low variance, never negative",
            code=f"{_KL}:k3",
        ),
    ),
    siblings=AlgorithmInfo,
)


def estimator_info(name: str) -> EstimatorInfo:
    """Find the info of an advantage estimator; a user function, `path/to/file.py:name`, is imported for this.

    Raises the errors of `iiverl_core.algorithms.find_estimator`.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    custom = load_code(f"{_USER_FUNCTIONS}:find_estimator", name)(name)
    return EstimatorInfo(
        name=name,
        summary="",
        code=name,
        min_group_size=custom.min_group_size,
        greedy_baseline=custom.greedy_baseline,
        per_group=custom.per_group,
    )


def policy_loss_info(name: str) -> PolicyLossInfo:
    """Find the info of a policy loss; a user function, `path/to/file.py:name`, is imported for this.

    Raises the errors of `iiverl_core.algorithms.find_policy_loss`.
    """
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    custom = load_code(f"{_USER_FUNCTIONS}:find_policy_loss", name)(name)
    select_tokens = name if custom.select_tokens else None
    return PolicyLossInfo(
        name=name, summary="", code=name, select_tokens=select_tokens, loss_agg_mode=custom.loss_agg_mode
    )
