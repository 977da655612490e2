"""Hides exactly those warnings of Megatron and torch that a user of this package cannot act on.

Imported by the package's ``__init__``, so before any module of ours imports megatron.
"""

import logging
import warnings

_HIDDEN = (
    # Megatron says on import which optional packages it does not find.
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (UserWarning, "Apex is not installed"),
    (UserWarning, "Failed to create unified memory mempool"),
    # Megatron warns about defaults of its own.
    (UserWarning, "full scope is deprecated"),
    (UserWarning, "The .grad attribute of a Tensor that is not a leaf Tensor"),
    # Megatron calls functions that torch 2.13 renames.
    (FutureWarning, "`torch.distributed.reduce_scatter_tensor` is deprecated"),
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated"),
    (FutureWarning, "`load_state_dict` is deprecated"),
    (FutureWarning, "Please use DTensor instead"),
)
for _category, _message in _HIDDEN:
    warnings.filterwarnings("ignore", message=_message, category=_category)

# Megatron's own functions, and the base class of its language models, call themselves outdated.
for _name in ("megatron.core.utils", "megatron.core.models.gpt.gpt_model"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# torch for CUDA where there is a compiler for CUDA but no device: doctor tells that.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in record.getMessage()
)
