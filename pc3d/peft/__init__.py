"""Parameter-efficient fine-tuning of any backbone: adapters that train while the pre-trained weights stay."""

from pc3d.peft.adaptation import (
    Adaptation,
    ParameterCounts,
    attach,
    attached,
    count_parameters,
    detach,
    disabled,
    merge,
    prepare,
    use,
)
from pc3d.peft.blocks import Bottleneck, Combined, Prompts
from pc3d.peft.dapt import DAPT
from pc3d.peft.files import base_state, fingerprint, load_adapter, save_adapter
from pc3d.peft.huggingface import export_lora, import_lora
from pc3d.peft.idpt import IDPT, IDPTSegmentation
from pc3d.peft.lora import LoRA
from pc3d.peft.point_peft import PointPEFT
from pc3d.peft.pointgst import PointGST
from pc3d.peft.selective import BitFit, LinearProbe, NormTuning, ScaleShift

__all__ = [
    "DAPT",
    "IDPT",
    "Adaptation",
    "BitFit",
    "Bottleneck",
    "Combined",
    "IDPTSegmentation",
    "LinearProbe",
    "LoRA",
    "NormTuning",
    "ParameterCounts",
    "PointGST",
    "PointPEFT",
    "Prompts",
    "ScaleShift",
    "attach",
    "attached",
    "base_state",
    "count_parameters",
    "detach",
    "disabled",
    "export_lora",
    "fingerprint",
    "import_lora",
    "load_adapter",
    "merge",
    "prepare",
    "save_adapter",
    "use",
]
