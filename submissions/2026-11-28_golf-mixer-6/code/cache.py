"""For predictors that are shown one token a lane and step: keys and values of the last tokens, and quick products."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Cache:
    """Rotated keys and values of each lane's last `context` tokens, in rings: the token at position p is in slot p % C.

    Active lanes have the first rows, in an order of the cache's own. So attention reads one block and copies nothing,
    whichever lanes are active.
    """

    def __init__(
        self,
        layers: int,
        lanes: int,
        context: int,
        kv_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        tables: Callable[[int], tuple[Tensor, Tensor]],
    ) -> None:
        """Empty, for `lanes` lanes and `layers` attention layers with `kv_heads` heads of `width` dimensions.

        `tables` gives the cosines and sines (N, 1, R / 2) of the first N positions.
        """
        self.tables = tables
        self.cos, self.sin = (table.to(device) for table in tables(context))
        shape = layers, lanes, kv_heads, context, width
        self.context = context
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.seen = torch.zeros(lanes, dtype=torch.int64, device=device)  # tokens that each row has seen
        self.row = torch.arange(lanes, device=device)  # where each lane is
        rings = torch.arange(lanes * kv_heads, device=device).view(lanes, -1)  # one for each row and head
        self.starts = context * rings  # their first slots
        self.active = self.places = self.order = self.row[:0]
        self.slots = self.starts[:0]
        self.length = 0  # slots of each ring that attention reads
        self.mask: Tensor | None = None  # (B, 1, 1, length), where some of these are empty

    def enter(self, lane: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make room for a token in each of the lanes (B,).

        Returns the lane index of each row (B,), the row of each lane (B,), and cosines and sines (B, 1, R / 2) of each
        row's position.
        """
        if not torch.equal(lane, self.active):
            self.move(lane)
        seen = self.seen[: len(lane)]
        positions = seen.clone()
        seen += 1
        self.slots = (self.starts[: len(lane)] + positions[:, None] % self.context).flatten()
        shortest, longest = (int(number) for number in seen.aminmax())
        self.length = min(self.context, longest)
        self.mask = None
        if shortest < self.length:
            empty = torch.arange(self.length, device=lane.device) >= seen[:, None]  # (B, L)
            self.mask = self.keys.new_zeros(empty.shape).masked_fill_(empty, -torch.inf)[:, None, None]
        if lane.device.type == "cuda":  # cuDNN's attention is the fastest, but plans anew for each shape
            steady = self.mask is None and self.length == self.context and len(lane) == len(self.row)
            torch.backends.cuda.enable_cudnn_sdp(steady)
        if longest > len(self.cos):
            self.cos, self.sin = (table.to(lane.device) for table in self.tables(2 * longest))
        return self.order, self.places, self.cos[positions], self.sin[positions]

    def move(self, lane: Tensor) -> None:
        """Bring the lanes (B,) to the first rows by swapping them with others; what is there already stays."""
        wanted = torch.zeros_like(self.row, dtype=torch.bool)
        wanted[self.row[lane]] = True
        far, free = wanted[len(lane) :].nonzero().squeeze(1) + len(lane), (~wanted[: len(lane)]).nonzero().squeeze(1)
        to, come = torch.cat([free, far]), torch.cat([far, free])
        for rows in (self.seen, *self.keys, *self.values):
            rows[to] = rows[come]
        moved = torch.arange(len(self.row), device=lane.device)
        moved[come] = to
        self.row = moved[self.row]
        self.active, self.places = lane.clone(), self.row[lane]
        self.order = self.places.argsort()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values (B, H_kv, D) of one layer; (B, H, D), what queries q (B, H, D) find in its cache."""
        B, kv_heads = k.shape[:2]
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 2).index_copy_(0, self.slots, k.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self.slots, v.flatten(0, 1))
        keys, values = keys[:B, :, : self.length], values[:B, :, : self.length]
        q = q.unflatten(1, (kv_heads, -1))  # (B, H_kv, G, D): heads that share keys are rows of one product
        if q.device.type != "cpu":
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
            return y.flatten(1, 2)
        # For one token a lane, torch's attention reads memory at little more than half the speed of plain products.
        q = q * q.size(-1) ** -0.5
        weights = (keys.flatten(0, 1) @ q.flatten(0, 1).mT).mT.unflatten(0, (B, -1))  # (B, H_kv, G, L)
        weights = (weights if self.mask is None else weights + self.mask).softmax(-1)
        y = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))
        return y.view(B, -1, q.size(-1))


# None on a torch without oneDNN.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As F.linear. In fp32 on an AMD CPU oneDNN's products are 2.5 times as fast as MKL's, which torch takes there."""
    if ONEDNN is None or x.device.type != "cpu":
        return F.linear(x, weight)
    product: Tensor = ONEDNN(x, weight, None, "none", [], "")
    return product
