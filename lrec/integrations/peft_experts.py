"""LoRA on packed experts under the names that peft knows them by.

`target_parameters` names fused parameters, as `experts.gate_up_proj`, of which peft adapts every slice by a pair of
matrices of its own. Packed experts are linears already, so that each gets an ordinary adapter of the same rank instead.
peft also rewrites `target_modules` of mixtures from the names of transformers 4; where experts are linears there is
nothing to rewrite, and it would mistake a shared expert's layers for theirs.
"""

import functools
from contextlib import nullcontext

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import transformers_weight_conversion
from torch import nn

from lrec import experts


def inject(tuner: BaseTuner, peft_config, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> list[str]:
    """Puts an adapter on each linear of the experts whose fused parameter `target_parameters` names; the names of those
    parameters."""
    found = []
    for name, module in [*experts.unfused(model)]:
        for part in experts.weights(module):
            key = f"{name}.{part}"
            if not any(key == target or key.endswith(f".{target}") for target in peft_config.target_parameters):
                continue
            linears = getattr(module, part)
            for own, linear in [*linears.named_children()]:
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    # By the parameter's name, as rank_pattern and alpha_pattern have it.
                    tuner._create_and_replace(peft_config, adapter_name, linear, own, linears, current_key=key)
            found.append(key)
    return found


def register() -> None:
    """Teaches peft about packed experts. Calling it again changes nothing."""
    original = BaseTuner._inject_parameters
    convert = transformers_weight_conversion.convert_peft_config_for_transformers
    if hasattr(original, "by_lrec"):
        return

    @functools.wraps(original)
    def inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        settings = (peft_config, model, adapter_name, low_cpu_mem_usage)
        return inject(self, *settings) + original(self, *settings)

    @functools.wraps(convert)
    def convert_config(peft_config, model, conversions):
        if not any(experts.unfused(model)):
            convert(peft_config, model, conversions)

    inject_parameters.by_lrec = True
    BaseTuner._inject_parameters = inject_parameters
    transformers_weight_conversion.convert_peft_config_for_transformers = convert_config


register()
