"""Attention with parameters: the projections around :func:`fastseq.ops.attention`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastseq.dispatch import check_name
from fastseq.ops.attention.api import ADDITIVE, SCORES, Keys, attention, prepare_keys


class Attention(nn.Module):
    """Attend from decoder states to encoder outputs.

    ==================  =======================================  ==================================================
    score               s(q, k)                                  parameters
    ==================  =======================================  ==================================================
    "dot"               scale * q . k                            none; needs query_size == key_size
    "general"           scale * q . (W k)                        key_proj.weight W (Q, K)
    "additive"          scale * v . tanh(U q + b + W k)          query_proj.weight U (A, Q), query_proj.bias b (A,),
                                                                 key_proj.weight W (A, K), v (A,)
    "normed_additive"   the same with g v / ||v|| for v          the same and gain g ()
    ==================  =======================================  ==================================================

    dot and general: Luong et al. 2015; additive: Bahdanau et al. 2015; the norm: Salimans & Kingma 2016.
    Initialisation: the projections as ``nn.Linear``, v uniform in +-1/sqrt(A); for "normed_additive" g = sqrt(1/A)
    and b = 0, as in GNMT (Wu et al. 2016).

    With ``coverage`` the additive scores get the term c w inside the tanh: coverage_weight w (A,), and c the attention
    that the position got at the steps before (See et al. 2017, equation 11). w starts as v does.

    Args:
        query_size: Q, the size of a query.
        key_size: K, the size of a key.
        score: see the table.
        attention_size: A, default Q; additive scores only.
        scale: a constant factor of the scores, default 1.0.
        bias: learn b, default True; additive scores only.
        coverage: learn w; additive scores only. Each call then needs ``coverage``.
        backend: "auto", "reference", "torch", "native" or "triton".

    Raises:
        ValueError: unknown score or backend; an option that the score does not take; sizes that do not fit.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        *,
        score: str = "additive",
        attention_size: int | None = None,
        scale: float | None = None,
        bias: bool | None = None,
        coverage: bool = False,
        backend: str = "auto",
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(query_size, key_size, score, attention_size, bias, coverage)
        self.query_size, self.key_size, self.score, self.scale = query_size, key_size, score, scale
        self.backend = check_name(backend)
        kind = {"device": device, "dtype": dtype}
        if score == "general":
            self.key_proj = nn.Linear(key_size, query_size, bias=False, **kind)
        elif score in ADDITIVE:
            size = query_size if attention_size is None else attention_size
            self.query_proj = nn.Linear(query_size, size, bias=bias is None or bias, **kind)
            self.key_proj = nn.Linear(key_size, size, bias=False, **kind)
            self.v = nn.Parameter(torch.empty(size, **kind))
            if score == "normed_additive":
                self.gain = nn.Parameter(torch.empty((), **kind))
            if coverage:
                self.coverage_weight = nn.Parameter(torch.empty(size, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as the class documents."""
        for projection in self.children():
            projection.reset_parameters()
        if self.score in ADDITIVE:
            bound = 1 / math.sqrt(self.v.numel())
            nn.init.uniform_(self.v, -bound, bound)
        if self._has_coverage():
            nn.init.uniform_(self.coverage_weight, -bound, bound)
        if self.score == "normed_additive":
            nn.init.constant_(self.gain, bound)
            if self.query_proj.bias is not None:
                nn.init.zeros_(self.query_proj.bias)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | Keys,
        values: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend once.

        Args:
            query: (B, T, Q), or (B, Q) for a single step.
            keys: (B, S, K); or the ``Keys`` of :meth:`project_keys`, which serve many calls.
            values: (B, S, D); default: the keys. Required with ``Keys``.
            lengths: (B,) integers: attend to the first ``lengths[b]`` positions. See :func:`fastseq.ops.attention`.
            mask: bool, True = attend: (B, S) or (B, T, S). Not together with ``lengths``.
            need_weights: also return the weights.
            coverage: (B, T, S), or (B, S) for a single step; required with the option ``coverage``, and only then.

        Returns:
            context (B, T, D), weights (B, T, S) or None; without the T for a single step.

        Raises:
            ValueError: ``Keys`` without values; coverage without the option, or none with it; see
                :func:`fastseq.ops.attention`.
            RuntimeError: see :func:`fastseq.ops.attention`.
        """
        if (coverage is not None) != self._has_coverage():
            given = "coverage must be given" if coverage is None else "no coverage was learnt; leave coverage out"
            raise ValueError(f"Attention: {given} (the module was made with coverage={coverage is None})")
        if isinstance(keys, Keys):
            projected = keys
            if values is None:
                raise ValueError("Attention: values must be given with projected keys")
        else:
            projected, values = self.project_keys(keys), keys if values is None else values
        if query.dim() not in (2, 3) or query.size(-1) != self.query_size:
            raise RuntimeError(
                f"Attention: query must have shape (B, T, {self.query_size}) or (B, {self.query_size}), "
                f"got {tuple(query.shape)}"
            )
        score, weight, gain = "dot", None, None
        if self.score in ADDITIVE:
            score, weight = self.score, self.v
            gain = self.gain if score == "normed_additive" else None
            query = self.query_proj(query)
        return attention(
            query,
            projected,
            values,
            score=score,
            weight=weight,
            gain=gain,
            scale=self.scale,
            lengths=lengths,
            mask=mask,
            need_weights=need_weights,
            coverage=None if coverage is None else coverage.to(query.dtype),
            coverage_weight=None if coverage is None else self.coverage_weight,
            backend=self.backend,
        )

    def _has_coverage(self) -> bool:
        return hasattr(self, "coverage_weight")

    if TYPE_CHECKING:  # nn.Module declares __call__ without types
        __call__ = forward

    def project_keys(
        self, keys: Tensor, lengths: Tensor | Sequence[int] | None = None, *, single_steps: bool = False
    ) -> Keys:
        """Compute the part of the scores that depends on the keys alone, once per sentence.

        Args:
            keys: (B, S, K).
            lengths: (B,) of the later calls; read with ``single_steps`` only.
            single_steps: many calls of one query step each will follow. The additive scores on the native CPU backend
                then precompute more: as much time as three such calls save, and the memory of the keys in float32.

        Returns:
            An immutable, opaque ``Keys`` for :meth:`forward`.

        Raises:
            RuntimeError: the shape does not fit.
        """
        if keys.dim() != 3 or keys.size(-1) != self.key_size:
            raise RuntimeError(f"Attention: keys must have shape (B, S, {self.key_size}), got {tuple(keys.shape)}")
        projected = keys if self.score == "dot" else self.key_proj(keys)
        if not single_steps or self._has_coverage():  # coverage enters the tanh with the keys: nothing to prepare
            return Keys(projected)
        return prepare_keys(projected, score=self.score, lengths=lengths, backend=self.backend)

    def extra_repr(self) -> str:
        parts = [f"{self.query_size}, {self.key_size}, score={self.score!r}"]
        parts += [f"attention_size={self.v.numel()}"] if hasattr(self, "v") else []
        parts += ["coverage=True"] if self._has_coverage() else []
        parts += [f"scale={self.scale}"] if self.scale is not None else []
        parts += [f"backend={self.backend!r}"] if self.backend != "auto" else []
        return ", ".join(parts)


def _check(
    query_size: int, key_size: int, score: str, attention_size: int | None, bias: bool | None, coverage: bool
) -> None:
    if score not in SCORES:
        raise ValueError(f"Attention: unknown score {score!r}; choose one of {', '.join(map(repr, SCORES))}")
    for name, size in (("query_size", query_size), ("key_size", key_size), ("attention_size", attention_size)):
        if size is not None and size < 1:
            raise ValueError(f"Attention: {name} must be at least 1, got {size}")
    if score == "dot" and query_size != key_size:
        raise ValueError(
            "Attention: score 'dot' multiplies query and key, so their sizes must be equal, "
            f"got {query_size} and {key_size}; choose 'general' or 'additive' for different sizes"
        )
    if score in ("dot", "general"):
        for name, value in (("attention_size", attention_size), ("bias", bias), ("coverage", coverage or None)):
            if value is not None:
                raise ValueError(f"Attention: score {score!r} has no use for {name}; leave it out or choose 'additive'")
