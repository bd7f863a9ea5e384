# Copyright 2026 The Olmem authors. Licensed under the Apache License, Version 2.0.
"""The classification heads, and the classes that Transformers' Auto classes find.

The heads are Transformers' generic ones, except that they make the model themselves. The generic ones ask `AutoModel`
for it, which would ask the user once more whether to trust the code of a Hub repository.
"""

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration_olmem import OlmemConfig
from .modeling_olmem import OlmemForCausalLM, OlmemModel, OlmemPreTrainedModel


class OlmemForSequenceClassification(GenericForSequenceClassification, OlmemPreTrainedModel):
    """Computes scores (B, num_labels) from the last real token of each row."""

    def __init__(self, config: OlmemConfig):
        OlmemPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0  # a config always has some; the type checker does not know it
        self.model = OlmemModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class OlmemForTokenClassification(GenericForTokenClassification, OlmemPreTrainedModel):
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
