"""`--lora` of the commands that run a model."""

from __future__ import annotations

import json

from adapters import write_adapter


def test_an_adapter_changes_what_is_said_and_one_that_does_not_fit_is_one_sentence(latentkv, model_folder, tmp_path):
    modules = [f"model.layers.{i}.self_attn.kv_b_proj" for i in (0, 1)]
    adapter = write_adapter(tmp_path / "adapter", model_folder, modules)
    asked = ("generate", "The whale swam", "-m", model_folder, "-n", 12, "--temperature", 0, "--json")
    plain, tuned = (json.loads(latentkv(*asked, *more).stdout) for more in ((), ("--lora", adapter)))
    assert plain["token_ids"] != tuned["token_ids"]
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    refused = latentkv(*asked, "--lora", adapter)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "has use_dora, which is not supported here: merge it with peft" in refused.stderr
