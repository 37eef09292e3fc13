"""Predict what a model needs: weights and KV cache in bytes, and the longest context that fits a memory."""

from latentkv.models.parameters import count_active_parameters, count_mtp_parameters, count_parameters, weight_bytes
from latentkv.plan.machine import Memory, machine_memory
from latentkv.plan.predict import CacheRow, Plan, as_kv_format, make_plan, mha_bytes
from latentkv.plan.source import BUILT_IN, StoredWeights, load_config, stored_weights

__all__ = [
    "BUILT_IN",
    "CacheRow",
    "Memory",
    "Plan",
    "StoredWeights",
    "as_kv_format",
    "count_active_parameters",
    "count_mtp_parameters",
    "count_parameters",
    "load_config",
    "machine_memory",
    "make_plan",
    "mha_bytes",
    "stored_weights",
    "weight_bytes",
]
