"""The names that programs import, importable as the documents write them."""

import subprocess
import sys

import pytest

PUBLIC = {
    "training_arb": ["ArbTrainer", "ArbTrainingArguments", "IntegerOptimizer", "audit_model"],
    "modeling_arb": ["ArbForCausalLM", "ArbModel"],
    "configuration_arb": ["ArbConfig", "preset_config"],
    "tokenization_arb": ["ArbTokenizer"],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_names_are_importable_from_the_package(package):
    for name in PUBLIC[package]:
        namespace = {}
        exec(f"from {package} import {name}", namespace)
        assert namespace[name].__name__ == name
        assert name in dir(sys.modules[package])
    namespace = {}
    exec(f"from {package} import *", namespace)
    assert set(PUBLIC[package]) <= namespace.keys()


def test_an_unknown_name_is_an_import_error():
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from training_arb import no_such_name")


def test_a_small_module_does_not_load_the_trainer():
    code = (
        "import sys, training_arb.common.text_table; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
