"""What both trainers refuse and say, whatever they train."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.lora.lora_trainer import LoraTrainer, LoraTrainingArguments
from training_arb.train.trainer_arb import ArbTrainer
from training_arb.train.training_args_arb import ArbTrainingArguments

ONE_LINE = r"^[^\n]*nn.DataParallel[^\n]*torchrun --nproc_per_node[^\n]*CUDA_VISIBLE_DEVICES[^\n]*$"
QUIET = {"use_cpu": True, "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


@pytest.fixture
def model():
    return ArbForCausalLM(preset_config("arb-tiny"))


def test_several_gpus_without_a_launcher_are_refused(model, tmp_path):
    args = ArbTrainingArguments(output_dir=str(tmp_path), **QUIET)
    args._n_gpu = 2  # what transformers counts on such a machine
    with pytest.raises(ValueError, match=ONE_LINE):
        ArbTrainer(model, args)
    args = LoraTrainingArguments(output_dir=str(tmp_path), **QUIET)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=ONE_LINE):
        LoraTrainer(get_peft_model(model, LoraConfig(target_modules="all-linear")), args, run_description={})


def test_replicas_of_a_hand_made_data_parallel_are_refused(model):
    """nn.DataParallel copies the modules that hold state; without a GPU it copies none, so they are asked here."""
    wrapped = nn.DataParallel(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match=ONE_LINE):
        for module in wrapped.module.modules():
            module._replicate_for_data_parallel()
