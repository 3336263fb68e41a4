"""ArbModel and ArbForCausalLM, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from configuration_arb import ArbConfig
from modeling_arb.generation.contrastive_search import contrastive_search

from .modeling_arb import ArbForCausalLM, ArbModel
from .pretrained import ArbPreTrainedModel

AutoConfig.register("arb", ArbConfig)
AutoModel.register(ArbConfig, ArbModel)
AutoModelForCausalLM.register(ArbConfig, ArbForCausalLM)

__all__ = ["ArbForCausalLM", "ArbModel", "ArbPreTrainedModel", "contrastive_search"]
