"""Kinds of work: what a kernel of a GPU, or an operator of torch, is for."""

from __future__ import annotations

import re

MATMUL, ATTENTION, COPY, ELEMENTWISE = "matmul", "attention", "copies and casts", "elementwise"
REDUCTION, LIKELIHOOD, OPTIMIZER = "reductions", "softmax and likelihood", "optimizer"
OTHER, VIEW = "other", "view"
KINDS = (MATMUL, ATTENTION, COPY, ELEMENTWISE, REDUCTION, LIKELIHOOD, OPTIMIZER, OTHER)

_KERNELS = [  # the first that is found in a kernel's name; the order decides where several are
    (OPTIMIZER, "adam|multi_tensor_apply|foreach|sgd"),
    (ATTENTION, "flash|fmha|attention|attn|varlen|mha_"),
    (LIKELIHOOD, "softmax|likelihood|cross_entropy|nll_loss|logsumexp|entropy"),
    (ELEMENTWISE, "triton_|rms_?norm|swiglu|geglu|rope|rotary|silu"),
    (MATMUL, "gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|_mm_|wgrad|dgrad"),
    (COPY, "copy|memcpy|memset|cast|catarray|fillfunctor|transpose"),
    (REDUCTION, "reduce"),
    (ELEMENTWISE, "elementwise|vectorized|norm|index|gather|scatter|embedding|sort|scan|arange|where"),
]
_OPERATORS = [  # the first that the whole name of an operator matches
    (
        VIEW,
        r"(_unsafe_)?view.*|t|transpose.*|permute|slice|select|as_strided|expand|(un)?squeeze|detach.*|alias|split.*",
    ),
    (
        VIEW,
        r"unbind|unfold|(sym_)?(size|stride|numel)|is_.*|narrow|diagonal|_reshape_alias|empty.*|new_empty.*|lift_.*",
    ),
    (
        VIEW,
        r"_local_scalar_dense|item|set_|resize_.*|chunk|reshape|contiguous|to|result_type|record_stream|pin_memory|_record_function.*|promote_types|_has_.*",
    ),
    (OPTIMIZER, r"_fused_.*|_foreach_.*|_amp_.*"),
    (ATTENTION, r".*attention.*|.*varlen.*|.*flash.*"),
    (MATMUL, r"(add|ba)?(b?mm|mv)|linear.*|matmul|einsum|dot|_?grouped_mm|baddbmm|.*scaled_mm.*"),
    (LIKELIHOOD, r".*softmax.*|nll_loss.*|logsumexp|.*cross_entropy.*|.*likelihood.*"),
    (REDUCTION, r"(nan)?sum|mean|prod|a?(max|min)|aminmax|any|all|.*norm.*|var(_mean)?|cumsum|argmax|argmin"),
    (COPY, r"_to_copy|copy.*|clone|cat|stack|fill.*|zero.*|new_zeros|ones.*|full.*|new_full|new_ones|constant_pad_nd"),
]


def of_kernel(name: str) -> str:
    """The kind of a kernel of a GPU by its name.

    >>> of_kernel("sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n"), of_kernel("void flash_bwd_dq_dk_dv_loop_seqk")
    ('matmul', 'attention')
    >>> of_kernel("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0"), of_kernel("bfloat16_copy_kernel_cuda")
    ('elementwise', 'copies and casts')
    """
    lower = name.lower()
    return next((kind for kind, pattern in _KERNELS if re.search(pattern, lower)), OTHER)


def of_operator(name: str) -> str:
    """The kind of an operator of torch by its name, without namespace and overload; ``view`` where it moves nothing.

    >>> [of_operator(name) for name in ("mm", "_to_copy", "mul", "t", "_fused_adamw_", "_flash_attention_forward")]
    ['matmul', 'copies and casts', 'elementwise', 'view', 'optimizer', 'attention']
    """
    return next((kind for kind, pattern in _OPERATORS if re.fullmatch(pattern, name)), ELEMENTWISE)
