"""Hides exactly those warnings of Megatron and torch that a user of this package cannot act on.

Imported by the package's ``__init__``, so before any module of ours imports megatron.
"""

import warnings

_HIDDEN = (
    # Megatron says on import which optional packages it does not find.
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (UserWarning, "Apex is not installed"),
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
