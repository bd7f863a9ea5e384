# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The classification heads, and the classes that Transformers' Auto classes find.

The heads are Transformers' generic ones with two differences. They make the model themselves: the generic ones ask
`AutoModel` for it, which would ask the user once more whether to trust the code of a Hub repository. And their loss is
that of a whole batch, in however many steps gradients are accumulated.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .compat_olmem import CACHE_NAME, takes_cache
from .configuration_olmem import OlmemConfig
from .modeling_olmem import OlmemForCausalLM, OlmemModel, OlmemPreTrainedModel


class WholeBatchLoss:
    """Lets a generic head divide the sum of its losses by the `num_items_in_batch` that it is given.

    `Trainer` counts the labels of all steps of a batch, hands their number to each step, and no longer divides the
    losses by the number of steps. The generic heads accept the number and drop it.
    """

    loss_of: Callable[..., torch.Tensor]  # of logits, labels, and the `num_items_in_batch`, which may be None

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast | TokenClassifierOutput:
        """Computes as the generic head does; without `num_items_in_batch` the loss is the mean over the labels."""
        kwargs |= {CACHE_NAME: past_key_values, "use_cache": use_cache, "return_dict": True}
        inputs = input_ids, attention_mask, position_ids
        output = super().forward(*inputs, inputs_embeds=inputs_embeds, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if labels is not None:
            output.loss = self.loss_of(output.logits, labels, num_items_in_batch)
        return output


class OlmemForSequenceClassification(WholeBatchLoss, GenericForSequenceClassification, OlmemPreTrainedModel):
    """Computes scores (B, num_labels) from the last real token of each row."""

    def __init__(self, config: OlmemConfig):
        OlmemPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0  # a config always has some; the type checker does not know it
        self.model = OlmemModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def loss_of(self, logits, labels, num_items_in_batch):
        given = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": self.config}
        if num_items_in_batch is None:
            return self.loss_function(**given)
        loss = self.loss_function(**given, num_items_in_batch=num_items_in_batch)
        if self.config.problem_type == "single_label_classification":
            return loss
        # The losses of numbers, and of several classes, are means whatever number they are given.
        return loss * labels.numel() / torch.as_tensor(num_items_in_batch, device=loss.device)


class OlmemForTokenClassification(WholeBatchLoss, GenericForTokenClassification, OlmemPreTrainedModel):
    """Computes scores (B, T, num_labels) for each token.

    The dropout before the head is `classifier_dropout` of the configuration, or 0.1.
    """

    def __init__(self, config: OlmemConfig):
        OlmemPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0  # a config always has some; the type checker does not know it
        self.model = OlmemModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def loss_of(self, logits, labels, num_items_in_batch):
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.loss_function(logits, labels, self.config, **given)


AUTO_CLASSES = (
    (AutoModel, OlmemModel),
    (AutoModelForCausalLM, OlmemForCausalLM),
    (AutoModelForSequenceClassification, OlmemForSequenceClassification),
    (AutoModelForTokenClassification, OlmemForTokenClassification),
)
for _auto_class, _model_class in AUTO_CLASSES:
    _auto_class.register(OlmemConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

# The class in the code of a Hub repository that each Auto class loads.
AUTO_MAP = {"AutoConfig": "configuration_olmem.OlmemConfig"} | {
    auto_class.__name__: f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}"
    for auto_class, model_class in AUTO_CLASSES
}

__all__ = ["AUTO_CLASSES", "AUTO_MAP", "OlmemForSequenceClassification", "OlmemForTokenClassification"]
