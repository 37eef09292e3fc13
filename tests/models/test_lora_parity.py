"""An adapter that PEFT trained or wrote gives the logits that PEFT's own `merge_and_unload` gives."""

from __future__ import annotations

import pytest
import torch
from families_for_tests import CASES, save_checkpoint
from test_parity import IDS, STEPWISE, TOLERANCE, error, run

from latentkv.models.loading import load_model

peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")

MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"kv_b_proj": 2, "layers.1.self_attn.o_proj": 6},
    "alpha_pattern": {"q_a_proj": 3, "^model.layers.0.self_attn.o_proj": 9},
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize(
    ("family", "modules", "said"),
    [
        ("deepseek_v3", MLA, PATTERNS),
        ("deepseek_v3", MLA, {"modules_to_save": ["lm_head"]}),
        ("llama", LLAMA, {"use_rslora": True}),
        ("qwen3", ["q_proj", "embed_tokens", "lm_head"], {}),
    ],
)
def test_logits_are_those_of_the_model_that_peft_merges(family, modules, said, tmp_path):
    case = next(case for case in CASES if case.model_type == family and not case.config.get("tie_word_embeddings"))
    model = save_checkpoint(case, tmp_path / "model")
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=modules, task_type="CAUSAL_LM", **said)
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = tuned.merge_and_unload()(torch.tensor([IDS])).logits[0]
    assert error(run(load_model(tmp_path / "model", lora=tmp_path / "adapter"), STEPWISE), expected) <= TOLERANCE
    assert error(run(load_model(tmp_path / "model"), STEPWISE), expected) > 100 * TOLERANCE
