"""The model of actor and reference: a causal LM that returns log-probs of given tokens instead of logits.

Weights have the names of the causal LM.

Suffixes: `_BL` rows and columns of token ids, `_BLD` hidden states and `_BKV` logits over them, `_T` trained tokens.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedConfig, PreTrainedModel

from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec
from iiverl_core.training.head import LogitTransform, head_log_probs
from iiverl_core.training.layout import PlacedImages
from iiverl_core.training.log_probs import token_log_probs
from iiverl_core.training.support import Support
from iiverl_core.training.vision import auto_class, reads_images, trained_hidden_states
from iiverl_fsdp.value_model import source

logger = logging.getLogger(__name__)
LARGE = 100.0  # a logit that any softcap changes
PROBED = 4  # tokens that are compared


class PolicyModel(nn.Module):
    """A causal LM whose head is applied to the positions that predict the trained tokens, without keeping their logits.

    That needs to know what the causal LM does with hidden states, which `find_transform` finds out; until then, and if
    it is more than a linear layer, a scale and a softcap, logits are computed by the causal LM itself.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        """Take the parts of a causal LM, by their names there."""
        super().__init__()
        self._language_model = (
            language_model,
        )  # not a module of its own, which would prefix the names of weights
        self._transform: LogitTransform | None = None
        for name, part in language_model.named_children():
            self.add_module(name, part)

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal LM."""
        return self._language_model[0]

    @property
    def computes_logits_at_once(self) -> bool:
        """Whether the logits of all tokens of a micro-batch exist at a time."""
        return self._transform is None

    def forward(
        self,
        input_ids_BL: Tensor,
        position_ids_BL: Tensor | None,
        rows_T: Tensor,
        columns_T: Tensor,
        targets_T: Tensor,
        temperature: float,
        *,
        support: Support | None = None,
        entropy: bool,
        entropy_gradient: bool,
        images: PlacedImages | None = None,
        **attention: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-probs of `targets_T`, predicted at (`rows_T`, `columns_T`), and with `entropy` the entropy there.

        With a `support`, both are of the softmax over its tokens. `images` are those of a model that reads some.

        `attention` goes to the causal LM's attention (`iiverl_fsdp.attention`).
        """
        wanted: dict[str, Any] = {
            "support": support,
            "entropy": entropy,
            "entropy_gradient": entropy_gradient,
        }
        if self._transform is None:
            kept = columns_T.unique()
            logits_BKV = self.language_model(
                input_ids=input_ids_BL,
                position_ids=position_ids_BL,
                use_cache=False,
                logits_to_keep=kept,
                **attention,
            ).logits
            logits_TV = logits_BKV[rows_T, torch.searchsorted(kept, columns_T)]
            return token_log_probs(logits_TV, targets_T, temperature, **wanted)
        backbone: Any = self.language_model.base_model
        hidden_BLD = trained_hidden_states(backbone, input_ids_BL, position_ids_BL, images, **attention)
        head = self.language_model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head_log_probs(
            hidden_BLD[rows_T, columns_T],
            head.weight,
            targets_T,
            temperature,
            bias_V=head.bias,
            transform=self._transform,
            **wanted,
        )

    @torch.no_grad()
    def find_transform(self, input_ids_BL: Tensor) -> None:
        """Find out how logits come from hidden states, by comparison on a few tokens.

        Models declare their scale and softcap under various names and do not declare other things, so what the names
        say is compared with the causal LM, on hidden states that are enlarged so that a softcap shows.
        """
        model, seen = self.language_model, []
        head = model.get_output_embeddings()
        if (
            not isinstance(head, nn.Linear) or model.base_model is model
        ):  # its backbone has another name than it says
            return

        def enlarge(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden_BLD,) = inputs
            largest = nn.functional.linear(hidden_BLD, head.weight, head.bias).abs().max()
            seen.extend([hidden_BLD, hidden_BLD * (LARGE / largest.clamp_min(1e-6))])
            return (seen[-1],)

        hidden_BLD = model.base_model(input_ids=input_ids_BL, use_cache=False).last_hidden_state
        hook = head.register_forward_pre_hook(enlarge)
        try:
            logits = model(input_ids=input_ids_BL, use_cache=False).logits
        finally:
            hook.remove()
        if len(seen) != 2:  # the head was not called, or more than once
            return
        transform = _declared_transform(model.config.get_text_config())
        expected = transform(nn.functional.linear(seen[1], head.weight, head.bias).to(torch.float64))
        # Weights that are not numbers show nothing; the run is to end because of them, at the first logits it uses.
        if expected.isnan().any() or (_same(hidden_BLD, seen[0]) and _same(expected, logits)):
            self._transform = transform


def _same(expected: Tensor, given: Tensor) -> bool:
    """Whether tensors are equal up to a few roundings."""
    if expected.shape != given.shape:
        return False
    allowed = 4 * torch.finfo(given.dtype).eps * expected.abs().max()
    return bool((expected - given).abs().max() <= allowed)


def _declared_transform(config: PreTrainedConfig) -> LogitTransform:
    """Read a model's scale and softcap from its configuration, under the names that are in use."""
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        scale *= float(getattr(config, name, None) or 1.0) ** power
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def build_policy_model(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> PolicyModel:
    """Build the causal LM of `config` on the default device."""
    return PolicyModel(auto_class(config).from_config(config, dtype=dtype))


def read_policy_model(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> PolicyModel:
    """Read the causal LM at `spec.model.path` into CPU memory; raises OSError or ValueError if there is none."""
    return PolicyModel(
        auto_class(config).from_pretrained(
            source(spec), config=config, dtype=dtype, trust_remote_code=spec.model.trust_remote_code
        )
    )


def probe_head(model: PolicyModel, spec: ModelSpec) -> None:
    """Find out how a sharded model computes logits, on all processes, and report once if they take memory.

    Raises:
        ConfigError: a vision-language model computes them by more than a linear layer, a scale and a softcap.
    """
    register_fsdp_forward_method(model, "find_transform")  # which gathers the weights of the head
    model.find_transform(torch.arange(PROBED, device=spec.device)[None])
    if model.computes_logits_at_once and reads_images(model.language_model.config):
        raise ConfigError(
            f"the {spec.role} model '{spec.model.path}' reads images, and computes logits by more than a linear layer, a scale "
            "and a softcap, which is not supported"
        )
    if model.computes_logits_at_once and dist.get_rank() == 0:
        logger.warning(
            "the %s model '%s' computes logits by more than a linear layer, a scale and a softcap: those of a whole "
            "micro-batch are in memory at once, which `iiverl plan` does not count",
            spec.role,
            spec.model.path,
        )
