"""Student logprobs at a few ids, and losses on them, from (hidden, lm_head) without N x V logits.

Three routes, all exact up to rounding, all with gradients for hidden, weight and bias:

* ``topk_logprobs``: logprobs and logsumexp for any later loss; vocabulary chunks, recomputed in the backward pass.
* ``fused_row_loss``: for a loss that is a sum over rows; row chunks, with gradients computed in the forward pass.
* ``subset_logits``: only the logits at the ids, for losses renormalised on them; no other logit is computed.

Shapes: N rows, H hidden, V vocabulary, K ids per row (-1 = pad). Nothing depends on the device.
"""

from topkd.topk.fused.functions import RowLoss
from topkd.topk.fused.head import disable_compile, fused_row_loss, gather_logprobs, subset_logits, topk_logprobs

__all__ = ["RowLoss", "disable_compile", "fused_row_loss", "gather_logprobs", "subset_logits", "topk_logprobs"]
